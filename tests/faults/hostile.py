"""Hostile files: pickles that leave a trace if anything unpickles them, safetensors whose headers lie, and a model's folder full of code."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path


class _Touches:
    """Unpickled, it makes a folder."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, tuple[str, int, bool]]:
        return os.makedirs, (str(self.canary), 0o777, True)


def pickled(canary: Path) -> bytes:
    """A pickle that makes the folder `canary` where it is read."""
    return pickle.dumps(_Touches(canary))


def torch_file(canary: Path) -> bytes:
    """The same as `torch.save` packs it."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("archive/data.pkl", pickled(canary))
        archive.writestr("archive/version", "3\n")
    return content.getvalue()


def safetensors(header: object, length: int | None = None, data: bytes = bytes(64)) -> bytes:
    """A safetensors file. length: what it says of its header's length, if other than the truth."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def _tensor(begin: int, end: int, shape: tuple[int, ...] = (4,), dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def liars() -> Mapping[str, bytes]:
    """Files that call themselves safetensors, by what is wrong with them."""
    return {
        "empty": b"",
        "three bytes": b"abc",
        "a header of 2^63 bytes": safetensors({}, length=2**63),
        "a header of 2^64 - 1 bytes": safetensors({}, length=2**64 - 1),
        "a header of 90 million bytes": safetensors({}, length=90_000_000),
        "a header that is no JSON": safetensors(b"{'a': 1}"),
        "a header that is a list": safetensors([1, 2]),
        "a header nested deep": safetensors(b"[" * 100_000),
        "offsets that overlap": safetensors({"a.lora_A.weight": _tensor(0, 16), "a.lora_B.weight": _tensor(8, 24)}),
        "offsets beyond the end": safetensors({"a.lora_A.weight": _tensor(0, 2**40, (2**38,))}),
        "offsets that run backwards": safetensors({"a.lora_A.weight": _tensor(16, 0)}),
        "a shape whose product overflows": safetensors({"a.lora_A.weight": _tensor(0, 16, (2**32, 2**32, 2**32))}),
        "a dtype that there is not": safetensors({"a.lora_A.weight": _tensor(0, 16, dtype="PICKLE")}),
        "bytes that belong to nothing": safetensors({"a.lora_A.weight": _tensor(0, 16)}, data=bytes(4096)),
        "metadata that is no text": safetensors({"__metadata__": {"a": [1]}, "a.lora_A.weight": _tensor(0, 16)}, data=bytes(16)),
    }


def poison(checkpoint: Path, contents: Mapping[str, bytes]) -> None:
    """Put other contents into a checkpoint, and write its manifest anew, as who can write there can."""
    for name, content in contents.items():
        (checkpoint / name).write_bytes(content)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    for path in sorted(checkpoint.iterdir()):
        if path.name != "manifest.json":
            manifest["files"][path.name] = {"sha256": sha256(path.read_bytes()).hexdigest(), "bytes": path.stat().st_size}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def hostile_model(model: Path, folder: Path, canary: Path, *, weights: bool) -> Path:
    """A copy of a model with code in every place where one of the libraries beneath has ever looked for some.

    weights: whether the safetensors stay; else only pickles of their names are there.
    """
    shutil.copytree(model, folder)
    code = f"import os\nos.makedirs({str(canary)!r}, exist_ok=True)\nfrom diffusers import FluxTransformer2DModel as Evil\nfrom transformers import *\n"
    maps = {"AutoModel": "modeling_evil.Evil", "AutoConfig": "modeling_evil.Evil", "AutoTokenizer": ["modeling_evil.Evil", None], "AutoImageProcessor": "modeling_evil.Evil"}
    for part in [folder, *(path for path in folder.iterdir() if path.is_dir())]:
        for name in ("modeling_evil.py", "pipeline.py", "__init__.py", "conftest.py", f"{part.name}.py", "tokenization_evil.py", "configuration_evil.py", "handler.py"):
            (part / name).write_text(code)
        for name in ("pytorch_model.bin", "diffusion_pytorch_model.bin", "model.ckpt", "optimizer.bin", "random_states_0.pkl", "training_args.bin", "model.pt", "tokenizer.pkl"):
            (part / name).write_bytes(torch_file(canary))
        for config in part.glob("*config*.json"):
            content = json.loads(config.read_text())
            config.write_text(json.dumps({**content, "auto_map": maps, "custom_pipeline": "pipeline", "trust_remote_code": True}))
        if not weights:
            for path in part.glob("*.safetensors*"):
                path.unlink()
    return folder


def name_code(model: Path, part: str) -> None:
    """Have a model's index say that one of its parts is made by code in the folder."""
    index = json.loads((model / "model_index.json").read_text())
    index[part] = ["modeling_evil", "Evil"]
    (model / "model_index.json").write_text(json.dumps(index))
