"""The `purelm` command. What a subcommand needs is imported when it runs: --help is quick."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .errors import ArgumentError, PurelmError

if TYPE_CHECKING:
    from .sft_options import Options

# A subcommand's exit codes: 0 done, 2 could not (with one line that says why), 130 interrupted.
FAILED, INTERRUPTED = 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    args = _parser().parse_args(argv)
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            # A byte or character that the terminal's encoding lacks is shown as one, not an error.
            stream.reconfigure(errors="replace")
    try:
        return int(args.run(args))
    except KeyboardInterrupt:
        print("purelm: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read the output has closed it; nothing is left to say.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (PurelmError, NotImplementedError) as problem:
        print(f"purelm: error: {problem}", file=sys.stderr)
        return FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="purelm", description="Fine-tune, run and export open language models."
    )
    parser.add_argument("--version", action="version", version=f"purelm {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add(commands, "sft", "fine-tune a model on examples", _sft, _sft_arguments)
    _add(commands, "chat", "talk to a model or an adapter", _chat, _chat_arguments)
    _add(commands, "generate", "answer one prompt", _generate, _generate_arguments)
    _add(commands, "serve", "answer over HTTP in OpenAI's API", _serve, _serve_arguments)
    _add(
        commands,
        "families",
        "list the model families that can be loaded, and which have GGUF files",
        _families,
    )
    _add(commands, "bench", "measure this machine", _bench, _bench_arguments)
    return parser


def _add(
    commands: Any,
    name: str,
    what: str,
    run: Callable[[argparse.Namespace], int],
    arguments: Callable[[argparse.ArgumentParser], None] | None = None,
) -> None:
    parser = commands.add_parser(name, help=what, description=what[0].upper() + what[1:] + ".")
    parser.set_defaults(run=run)
    if arguments is not None:
        arguments(parser)


# purelm sft


def _sft_arguments(parser: argparse.ArgumentParser) -> None:
    # Defaults stand in Options alone: what is not given is not in the namespace.
    parser.argument_default = argparse.SUPPRESS
    parser.epilog = (
        "Without MODEL and --data, the embedded model is fine-tuned on the embedded rows, with "
        "settings made for it."
    )
    one = parser.add_argument
    one("model", nargs="?", metavar="MODEL", help="folder or hub id (default: the embedded model)")
    one("--data", help=".jsonl or .parquet file, or a folder of datasets' save_to_disk")
    one("--output", help="where everything goes (default: purelm-sft)")
    one("--resume", action="store_true", help="go on from the output folder's checkpoint")
    one("--overwrite", action="store_true", help="throw the output folder's checkpoint away")

    section = parser.add_argument_group("what is trained")
    group = section.add_argument
    precisions = section.add_mutually_exclusive_group()
    for flag, value, what in (
        ("--4bit", "4bit", "adapters on a 4-bit base (default)"),
        ("--fp8", "fp8", "adapters on a base in fp8"),
        ("--16bit", "16bit", "adapters on a 16-bit base"),
        ("--full", "full", "all weights, no adapters"),
    ):
        precisions.add_argument(
            flag, dest="precision", action="store_const", const=value, help=what
        )
    group("--rank", type=int, help="rank of the adapters (default: 16)")
    group("--alpha", type=float, help="their strength is alpha / rank (default: the rank)")
    group("--dropout", type=float, help="dropout before the adapters (default: 0)")
    group(
        "--target-modules",
        type=_targets,
        help="names with commas, a regular expression, or all-linear (default: the usual seven)",
    )
    group("--use-rslora", action="store_true", help="strength alpha / sqrt(rank)")

    section = parser.add_argument_group("how")
    group = section.add_argument
    group("--compute", choices=["fp8"], help="products of a 4-bit or fp8 base in fp8")
    group("--dtype", help="float32 or bfloat16 (default: float32 on a CPU and for --full)")
    group("--device", help="cpu, cuda, cuda:1 (default: the first GPU if there is one)")
    group("--batch-size", type=int, help="rows at a time (default: 2)")
    group("--accumulation", type=int, help="batches per step (default: 4)")
    group(
        "--packing",
        action=argparse.BooleanOptionalAction,
        help="run a batch as one row without padding (default: where that is fastest)",
    )
    group(
        "--graph",
        action=argparse.BooleanOptionalAction,
        help="replay steps from CUDA graphs (default: where that can be)",
    )
    group(
        "--optimizer",
        help="adamw_torch_fused (default), adamw_8bit, paged_adamw_8bit, lion_8bit...",
    )
    group("--learning-rate", type=float, help="at its peak (default: 2e-4, for --full 2e-5)")
    group("--schedule", help="cosine, linear or constant (default: cosine)")
    group("--warmup", type=float, help="steps, or below 1 a share of them (default: 0.03)")
    group("--weight-decay", type=float, help="of matrices (default: 0.01)")
    group("--max-grad-norm", type=float, help="clip the gradient; 0 does not (default: 1)")
    group("--label-smoothing", type=float, help="of the target, spread evenly (default: 0)")
    group("--z-loss", type=float, help="weight of log-sum-exp squared, as 1e-4 (default: 0)")
    group("--seed", type=int, help="of adapters, dropout and order of rows (default: 3407)")
    group(
        "--recompute",
        action=argparse.BooleanOptionalAction,
        help="run layers again in backward to save memory (default: as far as it is needed)",
    )
    length = section.add_mutually_exclusive_group()
    length.add_argument("--max-steps", type=int, help="how many steps to train")
    length.add_argument("--epochs", type=float, help="or passes over the data (default: 1)")

    section = parser.add_argument_group("rows")
    group = section.add_argument
    group("--max-seq-length", type=int, help="tokens (default: the context, at most 2048)")
    long_rows = section.add_mutually_exclusive_group()
    for flag, value, what in (
        ("--truncate", "truncate", "cut rows that are longer (default: an error)"),
        ("--skip-long", "skip", "leave out rows that are longer"),
    ):
        long_rows.add_argument(flag, dest="too_long", action="store_const", const=value, help=what)
    held_out = section.add_mutually_exclusive_group()
    held_out.add_argument("--eval-data", help="rows to evaluate on")
    held_out.add_argument("--eval-fraction", type=float, help="or a share of the data")

    group = parser.add_argument_group("on the way and after").add_argument
    group("--eval-every", type=int, help="steps between evaluations (default: 0, none)")
    group("--save-every", type=int, help="steps between checkpoints, 0 for none (default: 200)")
    group("--prompt", help="answer this before and after (default: the first held-out row's)")
    group(
        "--merge",
        action=argparse.BooleanOptionalAction,
        help="also save the model with the adapter in it (default: yes)",
    )


def _targets(text: str) -> str | tuple[str, ...]:
    plain = text.replace(",", "").replace("_", "").replace(".", "").isalnum()
    return tuple(text.split(",")) if plain else text


def _sft(args: argparse.Namespace) -> int:
    options = sft_options({k: v for k, v in vars(args).items() if k != "run"})
    import torch

    from . import embedded, sft

    if options.model == embedded.MODEL:
        # Its matrices are too small to be shared: more threads would only wait for one another.
        torch.set_num_threads(1)
    try:
        sft.run(options)
    except KeyboardInterrupt:
        from . import train_state

        if train_state.exists(sft.checkpoint_folder(options)):
            print("purelm: the same command with --resume goes on", file=sys.stderr)
        raise
    return 0


def sft_options(given: dict[str, Any]) -> Options:
    """The options of a run from those that the command line gave, by name."""
    from dataclasses import replace

    from .sft_options import Options, embedded_options

    if "model" in given:
        if "data" not in given:
            raise ArgumentError(f"--data is missing: what is {given['model']} to be trained on?")
        return Options(**given)
    base = embedded_options()
    if "data" in given or "eval_fraction" in given:
        base = replace(base, eval_data=None)
    # --epochs means epochs even where the default counts steps.
    if "epochs" in given:
        base = replace(base, max_steps=None)
    return replace(base, **given)


# purelm chat and purelm generate


def _model_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument(name, metavar=name.upper(), help="model or adapter folder, or hub id")
    parser.add_argument("--4bit", dest="in_4bit", action="store_true", help="load in 4 bits")
    parser.add_argument("--dtype", help="float32 or bfloat16 (default: float32 on a CPU)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: the first GPU if any)")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="(default: 256)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--min-p", type=float)
    parser.add_argument("--repetition-penalty", type=float)
    parser.add_argument("--seed", type=int, help="of what is drawn (default: a fresh one)")


def _chat_arguments(parser: argparse.ArgumentParser) -> None:
    _model_arguments(parser, "folder")
    parser.add_argument("--system", help="a system message")


def _generate_arguments(parser: argparse.ArgumentParser) -> None:
    _model_arguments(parser, "model")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--raw", action="store_true", help="no chat template: continue the text")


def _keywords(args: argparse.Namespace) -> dict[str, Any]:
    names = ("top_k", "top_p", "min_p", "repetition_penalty", "seed")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    given["max_new_tokens"] = args.max_new_tokens
    if args.temperature == 0:
        for name in ("top_k", "top_p", "min_p", "seed"):
            if name in given:
                flag = "--" + name.replace("_", "-")
                raise ArgumentError(f"{flag} needs --temperature above 0: greedy draws nothing")
        return {**given, "do_sample": False}
    return {**given, "do_sample": True, "temperature": args.temperature}


def _chat(args: argparse.Namespace) -> int:
    from . import chat

    keywords = _keywords(args)
    model, tokenizer = chat.load(
        args.folder, in_4bit=args.in_4bit, dtype=args.dtype, device=args.device
    )
    if not tokenizer.chat_template:
        raise ArgumentError(
            f"{args.folder} has no chat template; use purelm generate --raw to continue a text"
        )
    chat.repl(model, tokenizer, sys.stdin, sys.stdout, system=args.system, keywords=keywords)
    return 0


def _generate(args: argparse.Namespace) -> int:
    from . import chat

    keywords = _keywords(args)
    model, tokenizer = chat.load(
        args.model, in_4bit=args.in_4bit, dtype=args.dtype, device=args.device
    )
    in_chat = bool(tokenizer.chat_template) and not args.raw
    prompt = [{"role": "user", "content": args.prompt}] if in_chat else args.prompt

    def write(text: str) -> None:
        print(text, end="", flush=True)

    chat.answer(model, tokenizer, prompt, write=write, **keywords)
    print()
    return 0


# purelm serve


def _serve_arguments(parser: argparse.ArgumentParser) -> None:
    from .serve_options import add_arguments

    add_arguments(parser)


def _serve(args: argparse.Namespace) -> int:
    from .serve_options import from_arguments

    options = from_arguments(args)
    from . import chat, serve

    model, tokenizer = chat.load(
        args.model, in_4bit=args.in_4bit, dtype=args.dtype, device=args.device
    )
    serve.run(model, tokenizer, options)
    return 0


# purelm families


def _families(_: argparse.Namespace) -> int:
    from .convert.gguf_architectures import of_family
    from .convert.registry import FAMILIES

    rows = [("model_type", "class in transformers", "GGUF")]
    for name, family in FAMILIES.items():
        files = of_family(name)
        rows.append((name, family.hf_class, "-" if files is None else files.name))
    wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, wide, strict=True)).rstrip())
    return 0


# purelm bench


def _bench_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", metavar="WHAT", help="one of " + ", ".join(_benches()))
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="its own arguments")


def _benches() -> list[str]:
    """The modules of `purelm.bench`: each is a program that prints its figures."""
    from importlib.resources import files

    names = (Path(file.name) for file in files("purelm.bench").iterdir())
    return sorted(name.stem for name in names if name.suffix == ".py" and name.stem[0] != "_")


def _bench(args: argparse.Namespace) -> int:
    from importlib import import_module

    if args.what not in _benches():
        raise ArgumentError(f"bench {args.what!r}: expected one of {', '.join(_benches())}")
    return int(import_module(f"purelm.bench.{args.what}").main(args.rest))


if __name__ == "__main__":
    sys.exit(main())
