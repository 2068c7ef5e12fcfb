# The command line in an image:
#   docker build -t scalekd .
#   docker run --rm scalekd demo --output /tmp/demo
#   docker run --rm --gpus all -v /imagenet:/imagenet:ro -v "$PWD":/work scalekd cache-teacher …
# A build for CPUs, where an index has one: --build-arg TORCH="torch torchvision --index-url URL"
FROM python:3.12-slim
ARG TORCH="torch==2.14.1 torchvision==0.29.1"
RUN pip install --no-cache-dir ${TORCH}
COPY pyproject.toml README.md LICENSE /src/
COPY scalekd /src/scalekd
COPY cli /src/cli
COPY pipelines /src/pipelines
RUN pip install --no-cache-dir "/src[remote]" && rm -rf /src
WORKDIR /work
ENTRYPOINT ["scalekd"]
CMD ["--help"]
