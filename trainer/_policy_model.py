"""The trained model in the learner's process: loading, and log-probs of chosen tokens with a gradient.

Invariant: logits exist only at the positions that are asked for, so memory follows sampled tokens, not context.
Shape legend: as in `palaestra.trainer.batch`; `V` the vocabulary.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from palaestra.errors import ConfigError
from palaestra.trainer.learner import LearnerConfig

_HUB_ERRORS = (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError)
_LOAD_ERRORS = (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError)


class PolicyModel:
    """A causal language model in float32; the forward pass may be bfloat16."""

    def __init__(self, model_path: str, config: LearnerConfig) -> None:
        """Raises `ConfigError` in one line when the model does not load completely or there is no such device."""
        self.folder = local_folder(model_path)
        self.device = _device(config)
        # evaluation mode also for training: dropout would make the ratio to the engine's log-probs random
        self.network = _load(self.folder).to(self.device).eval()
        self.vocab_size = int(self.network.get_input_embeddings().weight.shape[0])
        is_gpu = self.device.type == "cuda"
        self._is_bfloat16 = config.precision == "bfloat16" or (config.precision == "auto" and is_gpu)
        self._chosen: Tensor | None = None
        head = self.network.get_output_embeddings()
        if not isinstance(head, nn.Module):
            raise ConfigError(f"{model_path}: {type(self.network).__name__} has no output head to train")
        head.register_forward_pre_hook(self._choose)

    def logprobs(
        self,
        ids_BP: NDArray[Any],
        row_N: NDArray[Any],
        position_N: NDArray[Any],
        target_N: NDArray[Any],
        *,
        temperature: float,
    ) -> Tensor:
        """Log-probs in nats of `target` under `softmax(logits[row, position] / temperature)`, shape (N,), float32.

        Rows are padded on the right; a causal model needs no attention mask for that.
        """
        self._chosen = self.tensor(row_N * ids_BP.shape[1] + position_N)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._is_bfloat16):
            logits_NV = self.network(input_ids=self.tensor(ids_BP), use_cache=False).logits[0]
        scaled_NV = logits_NV.float() if temperature == 1.0 else logits_NV.float() / temperature
        return -nn.functional.cross_entropy(scaled_NV, self.tensor(target_N), reduction="none")

    def describe_device(self) -> str:
        """What computes, and how precisely."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else platform.machine()
        return f"{self.device.type} {name}, {'bfloat16' if self._is_bfloat16 else 'float32'}"

    def tensor(self, array: NDArray[Any]) -> Tensor:
        """The array on the model's device."""
        return torch.from_numpy(array).to(self.device)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Trained parameters by name; tied ones once."""
        return dict(self.network.named_parameters())

    def _choose(self, head: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        # a hook, because what a model does after its head (scaling, soft caps) must stay the model's business
        (hidden_BPH,) = args
        assert self._chosen is not None
        return (hidden_BPH.flatten(0, 1).index_select(0, self._chosen)[None],)


def local_folder(model_path: str) -> Path:
    """The folder of a model, fetched from the hub where it is a name; raises `ConfigError` when there is none."""
    folder = Path(model_path).expanduser()
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(model_path))
    except _HUB_ERRORS as error:
        raise ConfigError(
            f"no model folder {model_path!r}, nor a hub model that can be reached: {_first_line(error)}"
        ) from error


def _load(folder: Path) -> Any:
    try:
        network, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    except _LOAD_ERRORS as error:
        place = _damaged_weights(folder) or f"model folder {folder}"
        raise ConfigError(f"{place} does not load: {_first_line(error)}") from error
    # transformers only warns about these and trains on random numbers
    missing = sorted(info["missing_keys"])
    if missing:
        raise ConfigError(f"model folder {folder} lacks {len(missing)} weights, the first is {missing[0]}")
    return network


def _damaged_weights(folder: Path) -> Path | None:
    """The first of its weights files that cannot be opened; the library's own error does not name it."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except (OSError, SafetensorError):
            return path
    return None


def _device(config: LearnerConfig) -> torch.device:
    has_gpu = torch.cuda.is_available()
    if config.device == "gpu" and not has_gpu:
        raise ConfigError("learner.device 'gpu' asked for, but torch sees none; choose 'cpu' or install a CUDA build")
    return torch.device("cuda" if has_gpu and config.device != "cpu" else "cpu")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
