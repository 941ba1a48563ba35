"""Makes the repository importable, and gives every test process one thread: the tensors are tiny, and threads that wait
for each other on a busy machine are slower than none."""
import json
import os
import shutil
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from processes import free_port  # noqa: E402
from support import onednn  # noqa: E402
from support.verify_math import ended_now  # noqa: E402


@pytest.fixture(params=["plain", "oneDNN"])
def products(request, monkeypatch):
    """Runs a test twice: with the model as it is, and with all its matrix products by oneDNN. The test hands its model
    to what this returns, before it uses it."""
    for limit in ("ONEDNN_FROM", "PACKED_FROM"):
        monkeypatch.setattr(onednn, limit, 1 if request.param == "oneDNN" else float("inf"))
    if request.param == "oneDNN" and not onednn.has_onednn(torch.ones(1)):
        pytest.skip("this PyTorch has no oneDNN for the CPU")
    return onednn.use_onednn if request.param == "oneDNN" else lambda model: model


TINY = Path(__file__).resolve().parent.parent / "assets/tiny"


@pytest.fixture(scope="session")
def qwen3_folder(tmp_path_factory) -> Path:
    """A small Qwen3-VL without weights: the tiny model's tokenizer, and the pictures of its family."""
    folder = tmp_path_factory.mktemp("qwen3")
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    tiny = json.loads((TINY / "config.json").read_text())
    ids = {name: tiny[name] for name in ("vision_start_token_id", "vision_end_token_id", "image_token_id",
                                         "video_token_id")}
    text = {"model_type": "qwen3_vl_text", "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 48, "intermediate_size": 256, "vocab_size": tiny["vocab_size"],
            "rms_norm_eps": 1e-6, "rope_theta": 100.0, "eos_token_id": tiny["eos_token_id"],
            "tie_word_embeddings": True,
            "rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [8, 8, 8]}}
    vision = {"model_type": "qwen3_vl", "depth": 3, "hidden_size": 96, "num_heads": 4, "intermediate_size": 160,
              "hidden_act": "gelu_pytorch_tanh", "out_hidden_size": 128, "patch_size": 16, "spatial_merge_size": 2,
              "temporal_patch_size": 2, "num_position_embeddings": 36, "deepstack_visual_indexes": [0, 1]}
    (folder / "config.json").write_text(json.dumps({
        "model_type": "qwen3_vl", "architectures": ["Qwen3VLForConditionalGeneration"], "tie_word_embeddings": True,
        "dtype": "float32", "text_config": text, "vision_config": vision, **ids}))
    (folder / "preprocessor_config.json").write_text(json.dumps({
        "image_processor_type": "Qwen2VLImageProcessor", "patch_size": 16, "temporal_patch_size": 2, "merge_size": 2,
        "size": {"shortest_edge": 4096, "longest_edge": 16777216}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    return folder


@pytest.fixture
def one_rank(monkeypatch):
    """What torchrun sets for a single rank, for a test that calls main() in its own process."""
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1"),
                        ("MASTER_PORT", str(free_port()))):
        monkeypatch.setenv(name, value)
    ended_now()         # what other tests left in the count
    yield
    torch.set_grad_enabled(True)        # eval.py needs none, for the whole of its process
    if dist.is_initialized():
        dist.destroy_process_group()
