"""Small tokenizers of the two common kinds, as folders that transformers opens too."""

import json
from pathlib import Path

import tokenizers
from tokenizers import (
    AddedToken,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

TEXT = [
    "The quick brown fox jumps over the lazy dog. It's 12 o'clock, isn't it?",
    "Größe und Maß, naïve café, señor; 你好世界 こんにちは мир שלום مرحبا",
    "def f(x):\n\treturn x ** 2  # comment\n\n\n",
    "user assistant system tool question answer hello world",
] * 4

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}"
    "{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|fim_pad|>"]


def write(folder: Path, backend: tokenizers.Tokenizer, config: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def byte_level(folder: Path, **config) -> Path:
    """GPT-2's kind: every byte has a token; ChatML special tokens; pads with a token of its own."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=CHATML_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXT, trainer)
    backend.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("[x]", lstrip=True)])
    defaults = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "model_max_length": 64,
        "chat_template": CHATML,
        "image_token": "<|fim_pad|>",
        "of_somebody": {"kept": [1, 2]},
    }
    return write(folder, backend, defaults | config)


def sentencepiece(folder: Path, **config) -> Path:
    """Llama's kind: pieces with a ▁, byte fallback, and <s> put in front."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False)
    backend.train_from_iterator(TEXT, trainer)
    trained = json.loads(backend.to_str())
    trained["model"] |= {"byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>"}
    trained["added_tokens"] = trained["added_tokens"][:3]
    backend = tokenizers.Tokenizer.from_str(json.dumps(trained))
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    defaults = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": {"__type": "AddedToken", "content": "<s>", "normalized": False},
        "unk_token": "<unk>",
        "add_bos_token": True,
        "padding_side": "left",
        "clean_up_tokenization_spaces": True,
    }
    older = {"eos_token": {"content": "</s>", "lstrip": False, "normalized": False}}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "special_tokens_map.json").write_text(json.dumps(older), encoding="utf-8")
    return write(folder, backend, defaults | config)
