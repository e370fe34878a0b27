"""The LoRAs that clients may name: the safetensors files of one folder, by their names without the suffix."""

import os
import threading
from pathlib import Path

from ..errors import FileError, UsageError
from ..hooks import Lora
from ..hooks.lora import Typed
from ..hooks.plan import parse_plan
from ..lora.known import checked, remember
from ..params import FluxParams

SUFFIX = ".safetensors"
LISTED = 100
"""names in an error"""


class Shelf:
    """A folder of LoRAs, which is looked at again for each request. Nothing else of the disk has a name here."""

    def __init__(self, folder: Path | None, params: FluxParams) -> None:
        """folder: None for no LoRAs. params: of the model that they have to fit."""
        self.folder, self.params = folder and folder.resolve(), params
        self._hashed = threading.Lock()

    def files(self) -> dict[str, Path]:
        """What is there, by name."""
        found = sorted(self.folder.glob(f"*{SUFFIX}")) if self.folder else ()
        return {x.stem: x for x in found if x.is_file() and x.stem.isprintable() and not x.name.startswith(".")}

    def entries(self, scales: object) -> list[Lora]:
        """The entries of a plan for names with their scales: `{"style": 0.8}`, or `"0.8@0-13"` for some steps.

        UsageError; FileError for a file that does not fit the model.
        """
        if not isinstance(scales, dict):
            raise UsageError('loras must be names with their scales, as in {"style": 0.8}')
        files, found = self.files(), []
        for name, scale in scales.items():
            if name not in files:
                there = f"one of {', '.join(list(files)[:LISTED])}" if files else "leave it out, there is none"
                raise UsageError(f"there is no LoRA {name[:60]!a} here. Next: {there}")
            typed = Typed(name, str(scale)[:60]).entry()
            (entry,) = parse_plan([typed | {"file": str(files[name])}])
            found.append(self._checked(entry))  # type: ignore[arg-type]
        return found

    def name_of(self, record: Lora) -> str | None:
        """The name of the file that a picture's record means: the one with its hash, whatever it is called. None: it is
        not here. FileError."""
        files = sorted(self.files().items(), key=lambda x: x[1].name != record.file)  # most are still called so
        with self._hashed:
            return next((name for name, path in files if remember(path).sha256 == record.sha256), None)

    def recorded(self, entry: object) -> Lora:
        """The entry of a plan for a LoRA as a picture records it. UsageError where its file is not here; FileError."""
        (record,) = parse_plan([entry])
        if not isinstance(record, Lora) or not record.portable:
            raise UsageError("a record of a LoRA has its hash and the file's own name")
        if (name := self.name_of(record)) is None:
            raise UsageError(
                f"that picture was drawn with the LoRA {record.name[:60]}, SHA-256 {str(record.sha256)[:16]}…, which "
                "is not in the folder of LoRAs here. Next: put its file there"
            )
        update = {"file": str(self.files()[name]), "sha256": None, "autov3": None}
        return self._checked(record.model_copy(update=update))

    def _checked(self, entry: Lora) -> Lora:
        try:
            with self._hashed:  # once, whoever else asks for it
                return checked(entry, self.params)
        except FileError as error:
            raise FileError(str(error).replace(f"{self.folder}{os.sep}", "")) from None
