"""Sizes of blocks and shards where the options do not give them."""

BLOCK_SIZE = 256


def default_block_size(shard_size: int) -> int:
    """Views a block: 256, or the most below it that cut the shard into whole blocks."""
    return next(size for size in range(BLOCK_SIZE, 0, -1) if shard_size % size == 0)


def default_shard_size(num_samples: int) -> int:
    """Views a shard: about 64 shards, of 1 to 16 whole blocks.

    Small shards divide small sets among processes; large ones keep the number of files of
    ImageNet's 1.28 million samples (313 shards) and the work lost in a crash in balance.
    """
    blocks = -(-num_samples // (64 * BLOCK_SIZE))
    return BLOCK_SIZE * min(16, blocks)
