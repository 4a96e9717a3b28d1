"""A folder of compiled programs: text to look at, and to read again without compiling."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

from apt_jax.errors import UserError
from apt_jax.plan.hlo import is_whole
from apt_jax.plan.measure import Compiled


@dataclasses.dataclass(frozen=True)
class Kept:
    """For each program NAME.txt, the scheduled HLO, and NAME.json, the memory analysis in bytes.

    reuse: take what lies there, but for what was compiled with other flags. Whether it is this
    config's nobody checks.
    """

    folder: Path
    reuse: bool = False

    def check(self) -> None:
        """UserError where nothing can be written to the folder, asked before anything is compiled."""
        if self.reuse:
            return  # all may lie there
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.folder).close()
        except OSError as error:
            raise self._unwritable(error) from None

    def read(self, name: str, flags: dict[str, Any]) -> Compiled | None:
        """The program of that name; None where there is none, or one of other XLA options. One that
        was kept before these were noted is taken."""
        text, memory = self._paths(name)
        if not (self.reuse and text.is_file() and memory.is_file()):
            return None
        try:
            found = Compiled(text.read_text(), **json.loads(memory.read_text()))
            if found.text and not is_whole(found.text):
                raise ValueError(f"{text.name} beside it is cut off")
            return found if found.flags in (None, flags) else None
        except (ValueError, TypeError) as error:
            raise UserError(f"{memory} is damaged ({error}); delete it") from None

    def write(self, name: str, compiled: Compiled) -> None:
        text, memory = self._paths(name)
        value = dataclasses.asdict(compiled)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            text.write_text(value.pop("text"))
            memory.write_text(json.dumps(value) + "\n")
        except OSError as error:
            raise self._unwritable(error) from None

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(f"cannot write to {self.folder} ({error.strerror}); give --hlo a folder that "
                         "you may write to")

    def _paths(self, name: str) -> tuple[Path, Path]:
        stem = name.replace(" ", "_")
        return self.folder / f"{stem}.txt", self.folder / f"{stem}.json"
