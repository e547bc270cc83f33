"""Text to token ids and back, with the interface of transformers' fast tokenizers.

The work is done by the `tokenizers` library on tokenizer.json exactly as it stands; what is here is
the part that transformers adds to it: special tokens, padding, truncation, chat templates, saving.
It equals `transformers.PreTrainedTokenizerFast` (5.23) on the same folder.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers

from ..errors import ArgumentError, InputError, TemplateError, TokenizerError
from . import special_tokens, spm_tokenizer
from .batch_encoding import BatchEncoding
from .padding import check_side, pad_batch, strategies
from .text_input import text_inputs, why_not_text
from .tokenizer_files import CONFIG, read_backend, read_config, read_templates, rust, write_folder
from .vocabulary import Vocabulary, natural

if TYPE_CHECKING:
    from .push import Pushed

# Files that a tokenizer can be made of alone.
TOKENIZERS = ("tokenizer.json", "tokenizer.model")

# What transformers stores where a tokenizer names no longest input.
NO_MAX_LENGTH = int(1e30)


class Tokenizer(Vocabulary):
    """A tokenizer with the interface of transformers' `PreTrainedTokenizerFast`.

    Make one with `from_folder`. Tokenizing changes nothing in it and is safe from several threads;
    setting a special token, `add_tokens` and `add_special_tokens` change it in place, as they do in
    transformers.
    """

    is_fast = True
    pad_token_type_id = 0

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        config: Mapping[str, Any] | None = None,
        *,
        chat_template: str | Mapping[str, str] | None = None,
        name_or_path: str = "",
        file: Path | None = None,
    ) -> None:
        """`backend` becomes the tokenizer's own; `config` is a tokenizer_config.json's content."""
        config = dict(config or {})
        self._lock = threading.RLock()
        # A tokenizer.json can fix padding and truncation; a call overrides both, a save keeps them.
        self._file_padding, self._file_truncation = backend.padding, backend.truncation
        backend.no_padding()
        backend.no_truncation()
        if self._file_truncation is not None:
            config.setdefault("truncation_side", self._file_truncation["direction"])
        if self._file_padding is not None:
            config.setdefault("padding_side", self._file_padding["direction"])
            config.setdefault("pad_token", self._file_padding["pad_token"])
        self.init_kwargs = config
        self.name_or_path = name_or_path
        special = special_tokens.read(config, file)
        rust(
            lambda: special_tokens.install(backend, special),
            "the special tokens cannot be added",
            partial(TokenizerError, file=file),
        )
        super().__init__(backend, special)

        def setting(name: str, default: Any, kind: type | tuple[type, ...]) -> Any:
            value = config.get(name)
            if value is None:
                return default
            if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
                raise TokenizerError(f"{name} has the unusable value {value!r}", file=file)
            return value

        length = setting(
            "model_max_length", setting("max_len", NO_MAX_LENGTH, (int, float)), (int, float)
        )
        self.model_max_length = int(length)
        self.padding_side = check_side(setting("padding_side", "right", str), "padding_side", file)
        self.truncation_side = check_side(
            setting("truncation_side", "right", str), "truncation_side", file
        )
        self.model_input_names = [
            str(name)
            for name in setting("model_input_names", ["input_ids", "attention_mask"], list)
        ]
        self.clean_up_tokenization_spaces = setting("clean_up_tokenization_spaces", False, bool)
        self.split_special_tokens = setting("split_special_tokens", False, bool)
        self.chat_template = chat_template

    @classmethod
    def from_folder(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """The tokenizer in a folder: tokenizer.json, and the optional files around it.

        Without a tokenizer.json it is made of a SentencePiece model, tokenizer.model.

        Raises `TokenizerError`, which names the file, for anything absent, malformed, of a wrong
        type, or linked from outside the folder. No network, and no code from the folder is run.
        """
        folder = Path(path)
        config = read_config(folder)
        made_of_spm = spm_tokenizer.is_needed(folder)
        backend = spm_tokenizer.backend(folder, config) if made_of_spm else read_backend(folder)
        templates = read_templates(folder, config)
        return cls(
            backend, config, chat_template=templates, name_or_path=str(path), file=folder / CONFIG
        )

    def __call__(
        self,
        text: Any,
        text_pair: Any = None,
        *,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        stride: int = 0,
        is_split_into_words: bool = False,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        return_token_type_ids: bool | None = None,
        return_attention_mask: bool | None = None,
        return_overflowing_tokens: bool = False,
        return_special_tokens_mask: bool = False,
        return_offsets_mapping: bool = False,
        return_length: bool = False,
        split_special_tokens: bool | None = None,
        verbose: bool = True,
    ) -> BatchEncoding:
        """Ids, masks and whatever else is asked for, of one text or of a list of them.

        As in transformers, `max_length` alone turns truncation on, and a tokenizer that states no
        `model_max_length` neither truncates nor pads to one. Offsets count characters of the text.
        Raises `InputError` for what is not text and `ArgumentError` for options that contradict.
        """
        if padding is True and max_length is not None and not truncation and verbose:
            warnings.warn(
                "max_length is ignored when padding=True and nothing is truncated; "
                "padding='max_length' pads to it",
                stacklevel=2,
            )
        padding, truncation, max_length = strategies(
            padding, truncation, max_length, self.model_max_length, pad_to_multiple_of
        )
        self._check_pad(padding)
        inputs, batched = text_inputs(text, text_pair, is_split_into_words)
        split = self.split_special_tokens if split_special_tokens is None else split_special_tokens
        with self._lock:
            try:
                if truncation != "do_not_truncate":
                    self._truncate_to(max_length, stride, truncation)
                if padding != "do_not_pad":
                    self._backend.enable_padding(
                        length=max_length if padding == "max_length" else None,
                        direction=check_side(padding_side or self.padding_side, "padding_side"),
                        pad_id=self.pad_token_id,
                        pad_token=self.pad_token,
                        pad_type_id=0,
                        pad_to_multiple_of=pad_to_multiple_of,
                    )
                self._backend.encode_special_tokens = split
                encodings = rust(
                    lambda: self._backend.encode_batch(
                        inputs, is_split_into_words, add_special_tokens
                    ),
                    "the tokenizer cannot encode this",
                    InputError,
                )
            except TypeError:
                raise InputError(why_not_text(inputs)) from None
            finally:
                self._backend.no_truncation()
                self._backend.no_padding()
                self._backend.encode_special_tokens = False
        rows = [(index, encoding) for index, encoding in enumerate(encodings)]
        if return_overflowing_tokens:
            rows = [(i, part) for i, whole in rows for part in (whole, *whole.overflowing)]
        wanted = _wanted("token_type_ids", return_token_type_ids, self.model_input_names)
        masked = _wanted("attention_mask", return_attention_mask, self.model_input_names)
        data: dict[str, Any] = {"input_ids": [row.ids for _, row in rows]}
        if wanted:
            data["token_type_ids"] = [row.type_ids for _, row in rows]
        if masked:
            data["attention_mask"] = [row.attention_mask for _, row in rows]
        if return_special_tokens_mask:
            data["special_tokens_mask"] = [row.special_tokens_mask for _, row in rows]
        if return_offsets_mapping:
            data["offset_mapping"] = [row.offsets for _, row in rows]
        if return_length:
            data["length"] = [len(row.ids) for _, row in rows]
        if return_overflowing_tokens:
            data["overflow_to_sample_mapping"] = [index for index, _ in rows]
        if not batched and return_tensors is None and not return_overflowing_tokens:
            data = {k: v[0] if isinstance(v[0], list) else v for k, v in data.items()}
        return BatchEncoding(data, [row for _, row in rows], tensor_type=return_tensors)

    def encode(self, text: Any, text_pair: Any = None, **options: Any) -> Any:
        """The ids alone; takes what calling the tokenizer takes."""
        return self(text, text_pair, **options)["input_ids"]

    def tokenize(
        self, text: str, pair: str | None = None, add_special_tokens: bool = False
    ) -> list[str]:
        """The tokens' texts, as the vocabulary spells them."""
        return self(text, pair, add_special_tokens=add_special_tokens).tokens()

    def _check_pad(self, kind: str) -> None:
        if kind != "do_not_pad" and self.pad_token_id is None:
            raise ArgumentError(
                "padding needs a pad token and this tokenizer has none; set tokenizer.pad_token to "
                "a token that is not the eos token (convert.tokenizer_repair.repair picks one)"
            )

    def _truncate_to(self, max_length: Any, stride: int, strategy: str) -> None:
        try:
            self._backend.enable_truncation(
                max_length=max_length,
                stride=stride,
                strategy=strategy,
                direction=check_side(self.truncation_side, "truncation_side"),
            )
        except (OverflowError, ValueError, TypeError) as problem:
            raise ArgumentError(
                f"cannot truncate to max_length={max_length!r} with stride={stride!r}: {problem}"
            ) from None

    def pad(
        self,
        encoded_inputs: Any,
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
        verbose: bool = True,
    ) -> BatchEncoding:
        """Rows made one length: a list of dicts, a dict of lists, or one row; the input is kept."""
        kind, _, max_length = strategies(padding, False, max_length, self.model_max_length, None)
        self._check_pad(kind)
        return pad_batch(
            encoded_inputs,
            kind,
            name=self.model_input_names[0],
            pad_id=self.pad_token_id,
            max_length=max_length,
            multiple=pad_to_multiple_of,
            side=check_side(padding_side or self.padding_side, "padding_side"),
            mask=_wanted("attention_mask", return_attention_mask, self.model_input_names),
            tensor_type=return_tensors,
        )

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> Any:
        """The text of ids [s], or the list of texts of rows of ids [b, s] (lists or tensors).

        An id that no token has gives no text, as in transformers: models have spare rows.
        """
        if isinstance(token_ids, Mapping):
            token_ids = token_ids["input_ids"]
        ids = token_ids.tolist() if hasattr(token_ids, "tolist") else token_ids
        ids = [ids] if isinstance(ids, int) else list(ids)
        if ids and (not isinstance(ids[0], int) and hasattr(ids[0], "__len__")):
            return [
                self.decode(row, skip_special_tokens, clean_up_tokenization_spaces) for row in ids
            ]
        numbers = [natural(int(index)) for index in ids]
        text = str(self._backend.decode(numbers, skip_special_tokens=skip_special_tokens))
        clean = clean_up_tokenization_spaces
        if clean is None:
            clean = self.clean_up_tokenization_spaces
        return self._cleaned(text) if clean else text

    def batch_decode(
        self,
        sequences: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> list[str]:
        """`decode` that always gives a list."""
        texts = self.decode(sequences, skip_special_tokens, clean_up_tokenization_spaces)
        return [texts] if isinstance(texts, str) else list(texts)

    def _cleaned(self, text: str) -> str:
        # The rule was made for WordPiece and spoils the text of a BPE; transformers skips it there.
        force = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
        if type(self._backend.model).__name__ == "BPE" and not self.init_kwargs.get(force):
            return text
        for mark in (".", "?", "!", ","):
            text = text.replace(f" {mark}", mark)
        text = text.replace(" ' ", "'")
        for short in ("n't", "'m", "'s", "'ve", "'re"):
            text = text.replace(f" {short}", short)
        return text

    def get_chat_template(self, chat_template: str | None = None, tools: Any = None) -> str:
        """The text of the template to use: one given or named, the tool one, or the default."""
        templates = self.chat_template
        if isinstance(templates, Mapping):
            if chat_template is not None:
                return str(templates.get(chat_template, chat_template))
            name = "tool_use" if tools is not None and "tool_use" in templates else "default"
            if name not in templates:
                raise TemplateError(
                    f"the tokenizer has the chat templates {sorted(templates)} and no default; "
                    "give one of these names as chat_template"
                )
            return str(templates[name])
        if chat_template is not None:
            return chat_template
        if templates is None:
            raise TemplateError(
                "the tokenizer has no chat template; set tokenizer.chat_template or give one as "
                "chat_template"
            )
        return templates

    def apply_chat_template(
        self,
        conversation: Any,
        tools: Any = None,
        documents: Any = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        tokenize: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        return_dict: bool = True,
        return_assistant_tokens_mask: bool = False,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        **variables: Any,
    ) -> Any:
        """A conversation, or a list of them, as the model's own text or ids.

        Further keywords are the template's variables (`enable_thinking=False`). Nothing is added to
        what the template writes. `assistant_masks` are 1 where a token overlaps a
        `{% generation %}` block. Raises `TemplateError`.
        """
        batched = _is_batch(conversation)
        if return_assistant_tokens_mask and not (tokenize and return_dict):
            raise ArgumentError("return_assistant_tokens_mask needs tokenize and return_dict")
        template = self.get_chat_template(chat_template, tools)
        from . import chat_template as chat
        from .assistant_turns import token_mask

        if return_assistant_tokens_mask and not chat.marks_generation(template):
            raise TemplateError(
                "the chat template has no {% generation %} blocks, so it marks no assistant "
                "tokens; purelm.convert.assistant_turns.assistant_spans finds turns without them"
            )
        rendered = [
            chat.render(
                template,
                messages,
                tools=tools,
                documents=documents,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                special_tokens=self.special_tokens_map,
                variables=variables,
            )
            for messages in (conversation if batched else [conversation])
        ]
        texts = [chat_text.text for chat_text in rendered]
        if not tokenize:
            return texts if batched else texts[0]
        options: dict[str, Any] = {"add_special_tokens": False, "return_tensors": return_tensors}
        options |= {"padding": padding, "truncation": truncation, "max_length": max_length}
        batch = self(texts if batched else texts[0], **{**options, **(tokenizer_kwargs or {})})
        if return_assistant_tokens_mask:
            encodings = batch.encodings or []
            masks = [
                token_mask(row.offsets, text.spans, row.special_tokens_mask)
                for row, text in zip(encodings, rendered, strict=True)
            ]
            single = not batched and return_tensors is None
            batch["assistant_masks"] = masks[0] if single else masks
            batch.convert_to_tensors(return_tensors)
        return batch if return_dict else batch["input_ids"]

    def to_json(self) -> str:
        """The text of tokenizer.json: the file's own algorithm with the tokens added since."""
        with self._lock:
            try:
                if self._file_padding is not None:
                    self._backend.enable_padding(**self._file_padding)
                if self._file_truncation is not None:
                    self._backend.enable_truncation(**self._file_truncation)
                return str(self._backend.to_str(pretty=True))
            finally:
                self._backend.no_padding()
                self._backend.no_truncation()

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> tuple[str, ...]:
        """Writes the files that `from_folder` and transformers load the same tokenizer from.

        They are tokenizer.json, tokenizer_config.json and the chat templates as .jinja files. The
        folder appears, or changes, whole or not at all; files of another tokenizer in it are
        removed, all others kept. Gives the paths written. Raises `SaveError`.
        """
        from .tokenizer_export import config_of

        folder = Path(save_directory)
        return write_folder(folder, self.to_json(), config_of(self), self.chat_template)

    def push_to_hub(self, repo_id: str, **options: Any) -> Pushed:
        """Send what `save_pretrained` writes to the hub; `options` are those of `push.push`. Other
        files of the repository stay.
        """
        from .push import push

        return push(None, repo_id, self.save_pretrained, "tokenizer", **options)

    def to_transformers(self) -> Any:
        """The same tokenizer as a `transformers.PreTrainedTokenizerFast` of its own."""
        from .tokenizer_export import to_transformers

        return to_transformers(self)

    @classmethod
    def from_transformers(cls, tokenizer: Any) -> Tokenizer:
        """The tokenizer of a transformers fast tokenizer, which is left as it is."""
        from .tokenizer_export import from_transformers

        return from_transformers(tokenizer)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.RLock())

    def __repr__(self) -> str:
        return (
            f"Tokenizer({self.name_or_path!r}, {len(self)} tokens, "
            f"special_tokens={self.special_tokens_map}, padding_side={self.padding_side!r}, "
            f"model_max_length={self.model_max_length})"
        )


def _wanted(name: str, asked: bool | None, usual: list[str]) -> bool:
    return name in usual if asked is None else asked


def _is_batch(conversation: Any) -> bool:
    if not isinstance(conversation, list | tuple) or not conversation:
        raise TemplateError(f"expected a list of messages, found {str(conversation)[:100]!r}")
    return isinstance(conversation[0], list | tuple) or hasattr(conversation[0], "messages")
