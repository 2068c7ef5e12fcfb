"""Configuration of ``scalekd cache-teacher``: its options, and the configuration of the teacher."""

from pydantic import Field

from scalekd.options import Workers
from scalekd.pipelines._arithmetic import default_num_workers
from scalekd.pipelines._cache_options import CacheOptions
from scalekd.teachers import TeacherConfig


class CacheTeacherConfig(CacheOptions):
    """Options of ``scalekd cache-teacher``, with the configuration of the teacher."""

    teacher: TeacherConfig
    """Configuration of the teacher."""
    workers: Workers = Field(default_factory=default_num_workers)
    """Number of processes that draw views."""
    block_size: int | None = Field(default=None, ge=1, le=1 << 16)
    """Number of views in a block; if not given, the largest divisor of the shard size up to 256."""
