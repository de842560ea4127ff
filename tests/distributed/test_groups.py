"""Which ranks make a replica, and who speaks for it."""

from __future__ import annotations

import torch.distributed as dist
from megatron.core import parallel_state

from nemo_kd.config.shared import ParallelConfig
from nemo_kd.mcore.groups import initialize_model_parallel

LAYOUTS = {
    "data": (1, 1, 1),
    "tensor data": (2, 1, 1),
    "pipeline data": (1, 2, 1),
    "context data": (1, 1, 2),
    "pipeline tensor": (2, 2, 1),
    "pipeline context": (1, 2, 2),
    "context tensor": (2, 1, 2),
    "pipeline": (1, 4, 1),
}


def cuts() -> dict[str, tuple]:
    """Twice, so that every layout follows another one and is made again."""
    found = {}
    for name, sizes in [*LAYOUTS.items(), *LAYOUTS.items()]:
        groups = initialize_model_parallel(ParallelConfig(*sizes), seed=1)
        place = (
            groups.data_rank,
            groups.pipeline_rank,
            groups.context_rank,
            groups.tensor_rank,
        )
        speakers: list = [None] * len(groups.replica_ranks)
        dist.all_gather_object(
            speakers, (dist.get_rank(), groups.is_writer), group=groups.replica
        )
        members = {
            "tensor": groups.tensor,
            "context": parallel_state.get_context_parallel_group(),
            "pipeline": groups.pipeline,
            "data": groups.data,
        }
        lines = {
            axis: tuple(dist.get_process_group_ranks(group))
            for axis, group in members.items()
        }
        found[name] = (
            place,
            groups.replica_ranks,
            groups.writer_rank,
            speakers,
            lines,
        )
        assert groups.is_first_stage == (groups.pipeline_rank == 0)
        assert groups.is_last_stage == (groups.pipeline_rank == sizes[1] - 1)
        assert dist.get_backend(groups.replica) == "gloo"
    return found


def test_replicas_and_their_writers(ranks):
    results = ranks(4).run(cuts)
    for name, (tensor, pipeline, context) in LAYOUTS.items():
        places = {rank: result[name][0] for rank, result in enumerate(results)}
        assert len(set(places.values())) == 4, name
        for rank, result in enumerate(results):
            place, replica_ranks, writer_rank, speakers, lines = result[name]
            assert sorted(replica_ranks) == [
                other for other in places if places[other][0] == place[0]
            ], name
            assert len(replica_ranks) == tensor * pipeline * context
            assert places[writer_rank] == (place[0], pipeline - 1, 0, 0), name
            assert sorted(speakers) == sorted(
                (other, other == writer_rank) for other in replica_ranks
            ), name
            # Along an axis only that coordinate changes, from 0 upwards.
            for axis, coordinate in (
                ("data", 0),
                ("pipeline", 1),
                ("context", 2),
                ("tensor", 3),
            ):
                along = [places[other] for other in lines[axis]]
                assert rank in lines[axis]
                assert [other[coordinate] for other in along] == list(
                    range(len(along))
                ), (
                    name,
                    axis,
                )
                assert (
                    len(
                        {
                            other[:coordinate] + other[coordinate + 1 :]
                            for other in along
                        }
                    )
                    == 1
                ), (name, axis)
