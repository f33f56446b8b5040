"""What comes from outside may be broken or hostile: it runs no code, mixes no data, ends in a sentence."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_train import refused, run, weights

from full import checkpoint

ROOT = Path(__file__).parents[1]
TINY = ["teacher", "--preset", "tiny", "--batch", "4", "--steps", "2", "--save-every", "1"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of two steps with a checkpoint of each."""
    folder = tmp_path_factory.mktemp("made") / "run"
    run(*TINY, "--out", folder)
    return folder


@pytest.fixture
def kept(made, tmp_path):
    return shutil.copytree(made, tmp_path / "run")


class Command:
    """What a crafted pickle holds: it runs where it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_metadata_of_a_checkpoint_runs_no_code(made, tmp_path):
    for name in ("command", "bytes"):
        folder = shutil.copytree(made / "checkpoints" / "step-0000002", tmp_path / name)
        metadata = checkpoint.Reader(folder).read_metadata()
        if name == "command":
            metadata.planner_data = Command(tmp_path / "ran")
        else:  # torch unpickles what such an entry stands for
            key = next(iter(metadata.state_dict_metadata))
            metadata.state_dict_metadata[key] = checkpoint.dcp.metadata.BytesStorageMetadata()
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))
        net = torch.nn.Linear(1, 1, bias=False)
        with pytest.raises(ValueError):
            checkpoint.Run({"student": net}, {}, Path("none"), {}).load(folder)
        with pytest.raises(ValueError, match="expected descriptions of tensors alone"):
            checkpoint.Reader(folder).read_metadata()
    assert not (tmp_path / "ran").exists()


def test_checkpoint_reads_no_file_outside_its_folder(made, tmp_path):
    folder = shutil.copytree(made / "checkpoints" / "step-0000002", tmp_path / "out")
    metadata = checkpoint.Reader(folder).read_metadata()
    next(iter(metadata.storage_data.values())).relative_path = "../x.distcp"
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match="expected no folder"):
        checkpoint.Reader(folder).read_metadata()


def test_published_folders_run_no_code(tmp_path, monkeypatch):
    """Pickled weights and a tokenizer with code of its own are refused, without a question."""
    pytest.importorskip("transformers"), pytest.importorskip("diffusers")
    from test_sample import published

    from full.pixels import VAE, TextEncoder

    published(tmp_path / "wan", "causal", text_dim=32)
    for part, file, make in (("vae", "diffusion_pytorch_model", VAE), ("text_encoder", "model", TextEncoder)):
        folder = tmp_path / "wan" / part
        state = load_file(folder / f"{file}.safetensors")
        (folder / f"{file}.safetensors").unlink()
        name = file if part == "vae" else "pytorch_model"
        torch.save(state, folder / f"{name}.bin")
        with pytest.raises(ValueError, match=f"{part} cannot be loaded"):
            make(tmp_path / "wan")
        save_file(state, folder / f"{file}.safetensors", metadata={"format": "pt"})
    code = tmp_path / "wan" / "tokenizer"
    config = json.loads((code / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (code / "tokenizer_config.json").write_text(json.dumps(config))
    (code / "own.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\nclass Own: pass\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    try:
        TextEncoder(tmp_path / "wan")
    except ValueError as error:
        assert "tokenizer" in str(error)
    assert not (tmp_path / "ran").exists()
