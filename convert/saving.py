"""The methods by which the bridge saves itself, under their published names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ArgumentError

if TYPE_CHECKING:
    from .bridge import CausalLM
    from .push import Pushed
    from .vllm_export import VLLMExport


class Saving:
    """Saving methods of a `CausalLM`; each hands the model to the function that does it."""

    def save_pretrained(  # type: ignore[misc]
        self: CausalLM,
        folder: str | Path,
        selected_adapters: Sequence[str] | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **ignored: Any,
    ) -> None:
        """Write the adapters (all, or those selected) in peft's format and folders, or without any
        the whole model, in files of `max_shard_size`. Trainers' further keywords (state_dict,
        safe_serialization...) change nothing.

        Raises ArgumentError for push_to_hub=True, which `push_to_hub` does, and for selected
        adapters where there are none; else as `save_adapter` and `save_merged`.
        """
        from .adapter_write import save_adapter
        from .merge import save_merged

        if push_to_hub:
            raise ArgumentError(
                "save_pretrained writes a folder only; send it with model.push_to_hub(repo_id)"
            )
        if self._worn:
            save_adapter(self, folder, selected_adapters=selected_adapters)
        elif selected_adapters is not None:
            raise ArgumentError(
                f"selected_adapters is {selected_adapters!r:.200}, and the model wears none; leave "
                "it out to write the whole model"
            )
        else:
            save_merged(self, folder, max_shard_size=max_shard_size)

    def save_pretrained_merged(  # type: ignore[misc]
        self: CausalLM,
        folder: str | Path,
        tokenizer: Any = None,
        save_method: str = "merged_16bit",
        max_shard_size: int | str | None = None,
    ) -> None:
        """Write a whole model with the adapters merged in; see `merge.save_merged`."""
        from .merge import save_merged

        save_merged(self, folder, tokenizer, save_method, max_shard_size)

    def save_pretrained_gguf(  # type: ignore[misc]
        self: CausalLM,
        folder: str | Path,
        tokenizer: Any = None,
        quantization_method: str | Sequence[str] = "q8_0",
    ) -> list[Path]:
        """Write GGUF files with the adapters merged in; see `gguf_write.save_gguf`."""
        from .gguf_write import save_gguf

        return save_gguf(self, folder, tokenizer, quantization_method)

    def to_vllm(  # type: ignore[misc]
        self: CausalLM, folder: str | Path, tokenizer: Any = None, **options: Any
    ) -> VLLMExport:
        """Write base and adapters as vLLM serves them; see `vllm_export.to_vllm`, whose `options`
        it has. `print(model.to_vllm(folder))` shows the command.
        """
        from .vllm_export import to_vllm

        return to_vllm(self, folder, tokenizer, **options)

    def push_to_hub(  # type: ignore[misc]
        self: CausalLM, repo_id: str, tokenizer: Any = None, **options: Any
    ) -> Pushed:
        """Send what `save_pretrained` writes to the hub; `options` are those of `push.push`."""
        from .adapter_write import save_adapter
        from .merge import save_merged
        from .push import push

        trained = bool(self._worn)
        save = save_adapter if trained else save_merged
        kind = "adapter" if trained else "merged"
        return push(self, repo_id, lambda folder: save(self, folder, tokenizer), kind, **options)

    def push_to_hub_merged(  # type: ignore[misc]
        self: CausalLM,
        repo_id: str,
        tokenizer: Any = None,
        save_method: str = "merged_16bit",
        max_shard_size: int | str | None = None,
        **options: Any,
    ) -> Pushed:
        """Send what `save_pretrained_merged` writes to the hub; `options` as in `push.push`."""
        from .merge import save_merged
        from .push import push

        def save(folder: Path) -> None:
            save_merged(self, folder, tokenizer, save_method, max_shard_size)

        return push(
            self, repo_id, save, "adapter" if save_method == "lora" else "merged", **options
        )

    def push_to_hub_gguf(  # type: ignore[misc]
        self: CausalLM,
        repo_id: str,
        tokenizer: Any = None,
        quantization_method: str | Sequence[str] = "q8_0",
        **options: Any,
    ) -> Pushed:
        """Send what `save_pretrained_gguf` writes to the hub; `options` as in `push.push`."""
        from .gguf_write import save_gguf
        from .push import push

        def save(folder: Path) -> None:
            save_gguf(self, folder, tokenizer, quantization_method)

        return push(self, repo_id, save, "gguf", **options)
