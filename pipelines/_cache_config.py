"""Options of ``scalekd cache-teacher``, with the teacher that they name."""

from pydantic import Field

from scalekd.pipelines._arithmetic import default_num_workers
from scalekd.pipelines._cache_options import CacheOptions
from scalekd.teachers import TeacherConfig


class CacheTeacherConfig(CacheOptions):
    """The options of ``scalekd cache-teacher`` with the teacher that they name."""

    teacher: TeacherConfig
    """The teacher."""
    workers: int = Field(default_factory=default_num_workers, ge=0)
    """Number of processes that draw views."""
    block_size: int | None = Field(default=None, ge=1, le=1 << 16)
    """Views a block; at most 256, and a divisor of the shard size, if not given."""
