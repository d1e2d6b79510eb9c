# For a Cloud TPU VM: docker build -f docker/tpu.Dockerfile -t fasteagle-tpu . && docker run --privileged --net=host -it fasteagle-tpu
FROM python:3.11-slim

WORKDIR /opt/fasteagle-jax
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY fasteagle_jax ./fasteagle_jax
RUN pip install --no-cache-dir --constraint constraints.txt '.[train,tpu,gcs]'

COPY configs ./configs
COPY train ./train
COPY infer ./infer
ENTRYPOINT ["fasteagle"]
CMD ["--help"]
