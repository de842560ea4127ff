#!/usr/bin/env bash
# Collect in wheels/ what gpu-check imports beside torch, numpy, transformers, safetensors and their requirements.
# Run with the Python version of the GPU machine: PYTHON=python3.12 scripts/gpu_check_wheels.sh
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
MAX_MIB=60
PACKAGES=(
    # nemo_kd
    megatron-core lightning hydra-core omegaconf antlr4-python3-runtime orjson zstandard isal pybase64 tensorboard
    # the tests whose checks it shares
    pytest pluggy iniconfig
    # megatron-core and lightning
    einops psutil pytorch-lightning lightning-utilities torchmetrics absl-py
    # nemo-toolkit
    nemo-toolkit braceexpand googleapis-common-protos ml_dtypes nv-one-logger-core
    nv-one-logger-pytorch-lightning-integration nv-one-logger-training-telemetry onnx opentelemetry-api
    opentelemetry-exporter-http-transport opentelemetry-exporter-otlp-common
    opentelemetry-exporter-otlp-proto-common opentelemetry-exporter-otlp-proto-http opentelemetry-proto
    opentelemetry-sdk opentelemetry-semantic-conventions overrides pandas protobuf python-dateutil sentencepiece StrEnum
    toml webdataset wrapt
)

rm -rf wheels
"$PYTHON" -m pip wheel --quiet --no-deps --constraint constraints-cpu.txt --wheel-dir wheels "${PACKAGES[@]}"
mib=$(du --apparent-size --block-size=1M --summarize wheels | cut -f1)
echo "wheels/: $(find wheels -name '*.whl' | wc -l) wheels, $mib MiB"
if ((mib > MAX_MIB)); then
    echo "wheels/ may take $MAX_MIB MiB" >&2
    exit 1
fi
