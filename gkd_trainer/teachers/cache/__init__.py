"""A teacher's predictions on disk: the format, its writer and its reader."""

from gkd_trainer.teachers.cache.format import CacheSource, Manifest, read_manifest, source_of
from gkd_trainer.teachers.cache.joined import JoinedReader, read_manifests
from gkd_trainer.teachers.cache.parts import Part, folder_to_write
from gkd_trainer.teachers.cache.reader import CacheReader
from gkd_trainer.teachers.cache.writer import CacheWriter

__all__ = [
    "CacheReader",
    "CacheSource",
    "CacheWriter",
    "JoinedReader",
    "Manifest",
    "Part",
    "folder_to_write",
    "read_manifest",
    "read_manifests",
    "source_of",
]
