# The command line in an image:
#   docker build -t scalekd .
#   docker run --rm scalekd demo --output /tmp/demo
#   docker run --rm --gpus all --ipc=host -v /imagenet:/imagenet:ro -v "$PWD":/work \
#       -v ~/.cache/huggingface:/root/.cache/huggingface scalekd cache-teacher …
# Worker processes pass batches through shared memory, of which a container has 64 MB by default;
# --ipc=host, or --shm-size 16g, gives them enough.
# A build for CPUs, where an index has one: --build-arg TORCH="torch torchvision --index-url URL"
FROM python:3.12-slim
ARG TORCH="torch==2.14.1 torchvision==0.29.1"
# torch.compile and Triton's kernels build C and C++ code when they run.
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN pip install --no-cache-dir ${TORCH}
COPY pyproject.toml README.md LICENSE /src/
COPY scalekd /src/scalekd
COPY cli /src/cli
COPY pipelines /src/pipelines
RUN pip install --no-cache-dir "/src[remote]" && rm -rf /src
WORKDIR /work
ENTRYPOINT ["scalekd"]
CMD ["--help"]
