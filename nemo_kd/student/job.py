"""Stage 2: train a student from a cache of teacher logits, or on labels alone.

loss = sft_loss_weight * CE + kd_loss_weight * KD, each summed over its tokens, by default those in
the loss, and divided once by their number in the global batch. `train_student` is the run,
`StudentModule` a step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy
from nemo.utils import logging as nemo_logging
from nemo.utils.exp_manager import exp_manager
from omegaconf import OmegaConf
from transformers import PreTrainedTokenizerBase

from nemo_kd.config.answers import ANSWER_METRICS
from nemo_kd.config.exp_manager import CheckpointParams, EarlyStoppingParams
from nemo_kd.config.optim import check_lora
from nemo_kd.config.shared import check_training_layout
from nemo_kd.config.student import TrainStudentConfig
from nemo_kd.data.chat_template import fixed_date
from nemo_kd.data.tokenizer import load_tokenizer, padding_id
from nemo_kd.mcore.checkpoint import PretrainedModel, open_pretrained
from nemo_kd.mcore.distributed_checkpoint import load_sharded
from nemo_kd.mcore.groups import initialize_model_parallel, sharded_random_state
from nemo_kd.mcore.optimizer import release
from nemo_kd.run.collective import on_rank_zero, rank
from nemo_kd.run.interruption import Interruption, Watchdog, explained_ctrl_c
from nemo_kd.run.metrics import resolved_config, save_config
from nemo_kd.run.ranks import find_ranks, join_ranks
from nemo_kd.student.checkpoint_folder import (
    CheckpointError,
    Contents,
    choose_checkpoint,
)
from nemo_kd.student.checkpoints import Checkpoints
from nemo_kd.student.data import StudentData, check_dataset_settings, load_splits
from nemo_kd.student.first_step import show_first_step
from nemo_kd.student.loss import StudentLoss
from nemo_kd.student.module import StudentModule
from nemo_kd.student.reports import (
    RunLog,
    StudentRun,
    end_report,
    first_example,
    setup_report,
    start_wandb,
    stop_report,
)
from nemo_kd.student.run_folder import (
    check_same_experiment,
    experiment_record,
    own_run_folder,
    recorded_date,
)
from nemo_kd.student.steps import (
    STOPS_ALL_RANKS,
    check_intervals,
    check_loss_schedules,
    check_schedule,
    plan_training,
)

log = logging.getLogger(__name__)


def train_student(config: TrainStudentConfig) -> StudentRun:
    """Run stage 2: train, validate, keep the best checkpoints and write a .nemo archive.

    Every rank calls this; a process may call it several times, also after an error. With `dry_run`
    it only tries and shows the first step.

    Raises:
        ConfigError, DataError, CacheError, CheckpointError: the input is refused; before any step.
        NonFiniteError: a loss or gradient is not finite, and such steps are not skipped.
        Requeue: the run was told to stop, or its time is over; the same call resumes it.
    """
    model = config.model
    loss = StudentLoss(model.knowledge_distillation, model.data)
    check_monitor(config, loss)
    student: StudentModule | None = None
    with (
        explained_ctrl_c(lambda: stop_report(student)),
        contextlib.ExitStack() as stack,
    ):
        pl.seed_everything(model.seed)
        join_ranks(config.trainer)
        if not config.dry_run:
            on_rank_zero(
                lambda: own_run_folder(config.exp_manager, config.name, stack)
            )
        pretrained = stack.enter_context(
            open_pretrained(config.pretrained_checkpoint.restore_from_path)
        )
        data, tokenizer = _open_data(config, pretrained)
        stack.callback(data.close)
        evaluation = None
        if config.eval.interval:
            # Other runs load nothing that generates or checks answers.
            from nemo_kd.student.evaluate import Evaluation

            evaluation = Evaluation(config, pretrained, tokenizer)
        groups = data.groups
        ranks = groups.tensor_size * groups.context_size * groups.data_size
        num_logits = data.loss_tokens_per_step * pretrained.architecture.vocab_size
        loss.compile_if_worthwhile(data.plan.max_steps * num_logits / ranks)
        minutes = config.trainer.distributed_timeout_minutes
        watchdog = Watchdog(60 * minutes, rank())
        stack.enter_context(watchdog)
        if config.dry_run:
            with watchdog.pause("the dry run"):
                return show_first_step(
                    config, pretrained, data, loss, tokenizer, stack
                )
        with watchdog.pause("loading"):
            trainer, student = _load(config, pretrained, data, loss, watchdog, stack)
            student.evaluation = evaluation
            log.info(setup_report(student))
            log.info(first_example(data, tokenizer))
        _fit(trainer, student)
        if student.checkpoints is not None:
            with watchdog.pause("writing the .nemo archives"):
                student.checkpoints.write_archives(student)
        if "test" in data.splits:
            student.test()
        return end_report(student)


def check_monitor(config: TrainStudentConfig, loss: StudentLoss) -> None:
    """
    Raises:
        ConfigError: a metric that ranks checkpoints, or ends the run early, is not measured.
    """
    manager = config.exp_manager
    sources = loss.sources.get("validation", [])
    suffixes = ["", *(f"/{name}" for name in sources if len(sources) > 1)]
    known = [f"validation/{name}{end}" for end in suffixes for name in loss.reported]
    known.insert(0, "val_loss")
    if config.eval.interval:
        further = config.trainer.knowledge_distillation.inference_metrics or {}
        known += [*ANSWER_METRICS, *(f"eval/{name}" for name in further)]
    watching: list[CheckpointParams | EarlyStoppingParams] = [
        manager.checkpoint_callback_params
    ]
    stopping = manager.early_stopping_callback_params
    # It may also watch metrics of the training, which depend on the run.
    if manager.create_early_stopping_callback and stopping.monitor.startswith(
        ("val", "eval")
    ):
        watching.append(stopping)
    for params in watching:
        monitor = params.monitor
        if monitor.startswith("eval/") and not config.eval.interval:
            raise params.error(
                "monitor",
                f"{monitor} needs evaluations; set eval.interval, eval.data and eval.answer_field",
            )
        custom = loss.custom is not None and monitor.startswith("validation/")
        if monitor not in known and not custom:
            raise params.error(
                "monitor", f"{monitor!r} is not measured; known: {', '.join(known)}"
            )


def _open_data(
    config: TrainStudentConfig, pretrained: PretrainedModel
) -> tuple[StudentData, PreTrainedTokenizerBase]:
    """Check the model's layout and open its data."""
    model = config.model
    architecture = pretrained.architecture
    check_training_layout(architecture, model)
    check_lora(model.peft, architecture, model)
    dataset = model.data.dataset
    tokenizer = load_tokenizer(pretrained.tokenizer_folder, dataset.chat_template)
    check_dataset_settings(config)
    if not model.data.uses_cache or config.eval.interval:
        dataset.date = on_rank_zero(
            lambda: fixed_date(
                dataset, tokenizer, recorded_date(config.exp_manager, config.name)
            )
        )
    splits = load_splits(model, architecture, tokenizer)
    loop = config.trainer.knowledge_distillation
    plan = plan_training(loop, len(splits["train"]), model.global_batch_size)
    check_schedule(model.optim, plan.max_steps)
    check_loss_schedules(model.knowledge_distillation, plan.max_steps)
    check_intervals(config, plan)
    groups = initialize_model_parallel(model, model.seed)
    pad_id = padding_id(tokenizer, architecture.vocab_size)
    return StudentData(model, splits, plan, pad_id, groups), tokenizer


def _load(
    config: TrainStudentConfig,
    pretrained: PretrainedModel,
    data: StudentData,
    loss: StudentLoss,
    watchdog: Watchdog,
    stack: contextlib.ExitStack,
) -> tuple[pl.Trainer, StudentModule]:
    """Set up the run's folder, choose the checkpoint to resume, and load the student.

    Raises:
        CheckpointError: there is no checkpoint to resume, or it belongs to another experiment.
    """
    manager = config.exp_manager
    interruption = Interruption(manager.max_time_per_run, watchdog.rank)
    if manager.create_checkpoint_callback:
        stack.enter_context(interruption)
    record = experiment_record(
        config,
        pretrained.architecture,
        on_rank_zero(pretrained.fingerprint),
        data.descriptions,
        data.plan.steps_per_epoch,
    )
    trainer, log_dir = build_trainer(config, data)
    params = manager.checkpoint_callback_params
    dirpath = Path(params.dirpath or log_dir / "checkpoints")
    resumed = choose_checkpoint(dirpath, manager)
    if resumed is not None:
        check_same_experiment(resumed, record, config.allow_changed)
        trainer.ckpt_path = str(resumed)
    resolved = resolved_config(config)
    on_rank_zero(lambda: save_config(log_dir / "config.yaml", resolved))
    run_log = RunLog(log_dir, data.plan.max_steps, manager.log_interval_s, trainer)
    if manager.create_wandb_logger:
        start_wandb(run_log, manager.wandb_logger_kwargs, resolved, stack)
    student = StudentModule(config, pretrained, data, loss)
    stack.callback(release, student.model)
    student.watchdog = watchdog
    student.run_log = run_log
    student.interruption = interruption
    if manager.create_checkpoint_callback:
        student.checkpoints = Checkpoints(
            params, config.name, dirpath, data.groups.layout(), record, watchdog
        )
    return trainer, student


def _fit(trainer: pl.Trainer, student: StudentModule) -> None:
    """Train, and finish the checkpoint that is being written if all ranks stop together."""
    data = student.data
    validation: Any = data.loader("validation") if "validation" in data.splits else []
    together = True
    try:
        trainer.fit(student, data.loader("train"), validation)
    except BaseException as error:
        # A rank that fails alone would wait for the others.
        together = isinstance(error, STOPS_ALL_RANKS) or trainer.world_size == 1
        raise
    finally:
        student.run_log.end()
        if student.checkpoints is not None and together:
            student.checkpoints.finish()


NOT_NEMOS = {
    "create_checkpoint_callback": False,
    "resume_ignore_no_checkpoint": True,
    "resume_from_checkpoint": None,
    "disable_validation_on_resume": False,
    "max_time_per_run": None,
    "create_wandb_logger": False,
}
"""Keys that nemo_kd handles itself.

NeMo's `exp_manager` does not check checkpoints for damage, does not stop all ranks at one step, and
fails if Weights & Biases is out of reach."""


def build_trainer(
    config: TrainStudentConfig, data: StudentData
) -> tuple[pl.Trainer, Path]:
    """Return a Trainer with NeMo's loggers and callbacks, and the folder of the run."""
    loop = config.trainer.knowledge_distillation
    num_devices = config.trainer.num_devices
    trainer = pl.Trainer(
        accelerator="gpu" if data.groups.device.type == "cuda" else "cpu",
        devices=num_devices,
        num_nodes=config.trainer.num_nodes,
        strategy=MegatronStrategy(
            cluster_environment=LauncherEnvironment(num_devices)
        ),
        precision="32-true",  # Megatron casts by itself
        max_epochs=-1,  # `StudentModule` ends the run after `plan.max_steps`
        val_check_interval=data.plan.val_check_interval,
        check_val_every_n_epoch=None,  # counts steps over the whole run
        limit_val_batches=loop.limit_val_batches,
        log_every_n_steps=loop.log_every_n_steps,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        enable_progress_bar=False,
    )
    # NeMo logs that it finds no checkpoint, in the place where it is made to look.
    nemo_logging.set_verbosity(nemo_logging.ERROR)
    settings = {
        key: value
        for key, value in dataclasses.asdict(config.exp_manager).items()
        if value is not None and key != "log_interval_s"
    }
    settings.setdefault("name", config.name)
    settings["checkpoint_callback_params"]["dirpath"] = os.devnull
    log_dir = exp_manager(trainer, OmegaConf.create(settings | NOT_NEMOS))
    nemo_logging.set_verbosity(nemo_logging.WARNING)
    assert log_dir is not None
    return trainer, Path(log_dir)


class LauncherEnvironment(LightningEnvironment):
    """The ranks that the launcher started; Lightning's own search reads other jobs' variables."""

    def __init__(self, devices: int) -> None:
        super().__init__()
        self._ranks = find_ranks()
        self._devices = devices

    @property
    def creates_processes_externally(self) -> bool:
        return True

    def local_rank(self) -> int:
        return self._ranks.local_rank

    def node_rank(self) -> int:
        return self._ranks.rank // self._devices


class MegatronStrategy(DDPStrategy):
    """Ranks form Megatron's groups, and Megatron's buffers average the gradients.

    The process group and Megatron's groups exist before the Trainer. All ranks write checkpoints.
    """

    lightning_module: Any

    def configure_ddp(self) -> None:
        """Wrap nothing: the module holds Megatron's DistributedDataParallel."""

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return True

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        return optimizer.sharded_state_dict(self.lightning_module_state_dict())

    def save_checkpoint(
        self,
        checkpoint: dict[str, Any],
        filepath: str | Path,
        storage_options: Any = None,
    ) -> None:
        self.lightning_module.checkpoints.write(checkpoint)

    def load_checkpoint(self, checkpoint_path: str | Path) -> dict[str, Any]:
        """
        Raises:
            ConfigError, CheckpointError: the checkpoint is damaged or of another version.
        """
        folder = Path(checkpoint_path)
        state_dict = self.lightning_module_state_dict
        optimizer: Any = self.optimizers[0]
        wanted: dict[str, Any] = {
            "state_dict": state_dict(),
            "optimizer_states": [
                optimizer.sharded_state_dict(state_dict(), is_loading=True)
            ],
        }
        if Contents.read(folder).layout == self.lightning_module.groups.layout():
            wanted["random_state"] = sharded_random_state()
        with self.lightning_module.watchdog.pause("loading the checkpoint"):
            found = load_sharded(wanted, folder)
        if "schedule" not in found:
            raise CheckpointError(
                f"{folder} has no schedule, so another version wrote it; resume it with that version, "
                "or start over in another exp_manager.explicit_log_dir"
            )
        # Earlier versions kept the ranks as a callback's state.
        for key in list(found["callbacks"]):
            if key.startswith("StudentCheckpoints"):
                found["ranks"] = found["callbacks"].pop(key)
        return found

    def teardown(self) -> None:
        """Leave the weights on the device: Megatron's buffers hold them."""
