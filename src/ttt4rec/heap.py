"""The old place of ``malloc``."""

from .malloc import keep_freed_memory as keep_freed_memory
