# docker build -t nemo_kd .                  NVIDIA GPUs (Hopper, Ampere)
# docker build -t nemo_kd:cpu --target cpu . any machine

# Image and versions with which Megatron Core 0.19 is built and tested.
ARG PYTORCH_IMAGE=nvcr.io/nvidia/pytorch:26.06-py3

FROM python:3.11-slim-bookworm AS cpu
WORKDIR /opt/nemo_kd
COPY constraints-cpu.txt ./
RUN pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu "$(grep -i '^torch==' constraints-cpu.txt)"
COPY . .
RUN pip install --no-cache-dir -c constraints-cpu.txt .
RUN useradd --create-home nemo_kd && install -d -o nemo_kd /workspace
USER nemo_kd
WORKDIR /workspace
HEALTHCHECK --interval=5m --timeout=30s CMD compute_topk_logits --version
CMD ["compute_topk_logits", "--help"]

FROM ${PYTORCH_IMAGE} AS gpu
ARG TRANSFORMER_ENGINE_REF=v2.17.1
# Its tags end at 25.09; this is the last commit before the image.
ARG APEX_REF=becbb77cea4cb54f2929f7c938a0a6f7dd1fdc39
ARG MAX_JOBS=8
ENV NVTE_FRAMEWORK=pytorch MAX_JOBS=${MAX_JOBS} CUDA_DEVICE_MAX_CONNECTIONS=1
# The image's own constraints pin every package that it came with, Transformer Engine among them.
ENV PIP_CONSTRAINT=""
RUN pip install --no-cache-dir --no-build-isolation \
        "git+https://github.com/NVIDIA/TransformerEngine.git@${TRANSFORMER_ENGINE_REF}"
RUN APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-cache-dir --no-build-isolation \
        "git+https://github.com/NVIDIA/apex.git@${APEX_REF}"
# What was built with CUDA belongs together: neither this installation nor a later one may replace it.
RUN pip list --format=freeze | grep -iE '^(apex|flash|nvidia|torch|transformer.engine|triton)' > /etc/nemo_kd-constraints.txt
ENV PIP_CONSTRAINT=/etc/nemo_kd-constraints.txt
COPY . /opt/nemo_kd
RUN pip install --no-cache-dir /opt/nemo_kd
RUN useradd --create-home nemo_kd && install -d -o nemo_kd /workspace
USER nemo_kd
WORKDIR /workspace
HEALTHCHECK --interval=5m --timeout=30s CMD nvidia-smi --list-gpus && compute_topk_logits --version
CMD ["compute_topk_logits", "--help"]
