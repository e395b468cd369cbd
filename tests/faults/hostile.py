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

import pyarrow as pa
from PIL import Image
from pyarrow import parquet


class Touches:
    """Unpickled, it makes a folder."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, tuple[str, int, bool]]:
        return os.makedirs, (str(self.canary), 0o777, True)


def pickled(canary: Path) -> bytes:
    """A pickle that makes the folder `canary` where it is read."""
    return pickle.dumps(Touches(canary))


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


def hostile_tables(folder: Path, canary: Path) -> Mapping[str, str]:
    """Tables and saved datasets with pickles and code where one of the libraries beneath has ever looked for some: what a plan names, by what is hostile in it."""
    image, rows = io.BytesIO(), 3
    Image.new("RGB", (8, 8)).save(image, "PNG")
    columns = {"image": pa.array([image.getvalue()] * rows), "text": pa.array(["x"] * rows)}
    extension = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": pickled(canary)}  # pyarrow up to 13 unpickled it
    typed = pa.schema([pa.field("image", pa.binary()), pa.field("text", pa.string(), metadata=extension)])
    facts = {"info": {"features": {"text": {"_type": "Evil", "module": "evil"}, "image": {"dtype": "binary", "_type": "Value"}}, "builder_name": "evil", "download_checksums": {}}}
    described = pa.schema([("image", pa.binary()), ("text", pa.string())], metadata={"huggingface": json.dumps(facts), "pandas": pickled(canary), "numpy": pickled(canary)})
    found: dict[str, str] = {}
    for what, schema in (("an extension that is a pickle", typed), ("features and metadata of others", described)):
        table = pa.table(columns, schema=schema)
        place = folder / ("typed" if schema is typed else "described")
        (place / "saved").mkdir(parents=True)
        parquet.write_table(table, place / "rows.parquet")
        for arrow in (place / "rows.arrow", place / "saved" / "data.arrow"):
            with pa.OSFile(str(arrow), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
                writer.write_table(table)
        state = {"_data_files": [{"filename": "data.arrow"}], "_fingerprint": "evil", "_format_columns": None, "_format_kwargs": {"__reduce__": "os.system"}, "_format_type": "evil", "_output_all_columns": False, "_split": "train"}
        (place / "saved" / "state.json").write_text(json.dumps(state))
        (place / "saved" / "dataset_info.json").write_text(json.dumps({"builder_name": "evil", "features": {}, "task_templates": [{"task": "evil"}]}))
        for script in ("saved.py", "evil.py", "dataset.py", "__init__.py", "conftest.py"):
            for beside in (place, place / "saved"):
                (beside / script).write_text(f"import os; os.makedirs({str(canary)!r}, exist_ok=True)")
        for pickled_file in ("dataset.pickle", "indices.pkl", "cache.pt"):
            (place / "saved" / pickled_file).write_bytes(torch_file(canary))
        found |= {f"{what} in {name}": str(place / name) for name in ("rows.parquet", "rows.arrow", "saved")}
    return found


def name_code(model: Path, part: str) -> None:
    """Have a model's index say that one of its parts is made by code in the folder."""
    index = json.loads((model / "model_index.json").read_text())
    index[part] = ["modeling_evil", "Evil"]
    (model / "model_index.json").write_text(json.dumps(index))
