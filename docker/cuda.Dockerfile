# For a machine with CUDA 12 drivers: docker build -f docker/cuda.Dockerfile -t fasteagle-cuda . && docker run --gpus all -it fasteagle-cuda
FROM python:3.11-slim

WORKDIR /opt/fasteagle-jax
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY fasteagle_jax ./fasteagle_jax
RUN pip install --no-cache-dir --constraint constraints.txt '.[train,cuda]'

COPY configs ./configs
COPY train ./train
COPY infer ./infer
ENTRYPOINT ["fasteagle"]
CMD ["--help"]
