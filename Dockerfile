# docker build -t nemo_kd .                  NVIDIA GPUs (Hopper, Ampere)
# docker build -t nemo_kd:cpu --target cpu . any machine

ARG PYTORCH_IMAGE=nvcr.io/nvidia/pytorch:25.06-py3

FROM python:3.11-slim-bookworm AS cpu
WORKDIR /opt/nemo_kd
COPY constraints-cpu.txt ./
RUN pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu "$(grep -i '^torch==' constraints-cpu.txt)"
COPY . .
RUN pip install --no-cache-dir -c constraints-cpu.txt .
WORKDIR /workspace
CMD ["compute_topk_logits", "--help"]

FROM ${PYTORCH_IMAGE} AS gpu
ARG TRANSFORMER_ENGINE_REF=v2.5
ARG APEX_REF=25.07
ARG MAX_JOBS=8
ENV NVTE_FRAMEWORK=pytorch MAX_JOBS=${MAX_JOBS} CUDA_DEVICE_MAX_CONNECTIONS=1
# The image's own torch must stay: its CUDA libraries belong together.
RUN pip list --format=freeze | grep -E '^(torch|nvidia-)' > /etc/image-constraints.txt || true
RUN pip install --no-cache-dir --no-build-isolation \
        "git+https://github.com/NVIDIA/TransformerEngine.git@${TRANSFORMER_ENGINE_REF}"
RUN pip install --no-cache-dir --no-build-isolation \
        --config-settings "--build-option=--cpp_ext" --config-settings "--build-option=--cuda_ext" \
        "git+https://github.com/NVIDIA/apex.git@${APEX_REF}"
COPY . /opt/nemo_kd
RUN pip install --no-cache-dir -c /etc/image-constraints.txt /opt/nemo_kd
WORKDIR /workspace
CMD ["compute_topk_logits", "--help"]
