"""All access to a workdir, which is on a local disk or on NFS.

Every other module names files by paths and leaves all else to the functions here
(tests/test_storage_only.py checks that):

  paths.py      from the address that a person gave to a path; object stores are refused
  errors.py     errors of the machine, and the file that they are about
  reading.py    what is there, and its contents
  writing.py    files that are written atomically, names, directories
  appending.py  files to which records are appended
  syncing.py    until bytes and names are on the disk
  lock.py       one run at a time (imported on its own, as it prints)

A file's bytes, and its name in a directory, are only in the kernel's memory until they are synced,
for up to half a minute on Linux. What these functions write survives a power failure unless they
say otherwise.

This is where an object store would come in: `local` would let its addresses pass, and each file
above would get a second implementation. There a written object is durable and appears as a whole,
so that nothing is synced; a rename is a copy; appending means writing again; and a lock is an
object that can only be created if it does not exist. Orbax, which writes the arrays of a
checkpoint, has its own access to such stores.
"""

from resnet_flax.runtime.storage.appending import AppendedFile, note
from resnet_flax.runtime.storage.errors import OF_THE_MACHINE, naming
from resnet_flax.runtime.storage.paths import local
from resnet_flax.runtime.storage.reading import (
    check_room,
    exists,
    files_below,
    is_directory,
    is_file,
    names,
    read,
    read_json,
    sha256_of_file,
)
from resnet_flax.runtime.storage.syncing import sync_directory, sync_file, sync_tree
from resnet_flax.runtime.storage.writing import (
    make_directory,
    probe_directory,
    probe_file,
    remove,
    rename,
    write,
    write_by,
    write_json,
)

__all__ = [
    "OF_THE_MACHINE",
    "AppendedFile",
    "check_room",
    "exists",
    "files_below",
    "is_directory",
    "is_file",
    "local",
    "make_directory",
    "names",
    "naming",
    "note",
    "probe_directory",
    "probe_file",
    "read",
    "read_json",
    "remove",
    "rename",
    "sha256_of_file",
    "sync_directory",
    "sync_file",
    "sync_tree",
    "write",
    "write_by",
    "write_json",
]
