"""Tar archives on the host's side, for folders into and out of boxes.

Invariant: an archive that came out of a box is only ever read into memory, and never more of it than was asked for.
"""

from __future__ import annotations

import errno
import io
import tarfile
from collections.abc import Mapping


def pack_files(files: Mapping[str, bytes]) -> bytes:
    """A tar archive of these files."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(content), 0o644
            archive.addfile(member, io.BytesIO(content))
    return data.getvalue()


def unpack_files(archive: bytes, path: str, max_bytes: int) -> dict[str, bytes]:
    """The files of an archive that came out of a box; raises `OSError` when it is none, or has too much."""
    try:
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r:") as tar:
            members = [member for member in tar if member.isreg()]
            total = sum(member.size for member in members)
            if total > max_bytes:
                raise OSError(errno.EFBIG, f"{total} bytes are there, more than {max_bytes}", path)
            readers = {member.name: tar.extractfile(member) for member in members}
            return {name: reader.read() for name, reader in readers.items() if reader is not None}
    except tarfile.TarError as error:
        raise OSError(errno.EIO, f"the box sent no archive: {error}", path) from error
