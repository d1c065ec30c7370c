"""Command line of `python -m runtime.generate`, nothing else."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import TYPE_CHECKING, Any

import click

from runtime.errors import LoadError
from runtime.format import FormatError

if TYPE_CHECKING:
    from runtime.models.base import CausalLM
    from runtime.tokenizer import ChatTokenizer


def _token_ids(context: click.Context, parameter: click.Parameter, value: str | None) -> list[int] | None:
    if value is None:
        return None
    try:
        return [int(part) for part in value.split(",")]
    except ValueError:
        raise click.BadParameter("expected comma-separated token ids such as 1,2,3") from None


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("out", type=click.Path(exists=True, file_okay=False))
@click.option("--prompt", help="Text to continue; with --chat, the user's message.")
@click.option("--prompt-ids", callback=_token_ids, help="Token ids to continue, such as 1,2,3; needs no tokenizer.")
@click.option("--chat", is_flag=True, help="Put the prompt into the checkpoint's chat template.")
@click.option("--system", help="System message, with --chat.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0: most likely token.")
@click.option("--top-p", type=click.FloatRange(min=0, max=1, min_open=True), default=1.0, show_default=True)
@click.option("--top-k", type=click.IntRange(min=0), default=0, show_default=True, help="0: all tokens.")
@click.option("--seed", type=click.IntRange(min=0, max=2**63 - 1), help="Repeat a draw; default: a new one each time.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Default: cuda where there is one.")
@click.option(
    "--activations",
    type=click.Choice(["quantized", "full"]),
    default="quantized",
    show_default=True,
    help="quantized: as the checkpoint says; full: weights only, the reference.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end instead of streaming.")
@click.option("--stats", "show_stats", is_flag=True, help="Print times and memory to standard error.")
def main(
    out: str,
    prompt: str | None,
    prompt_ids: list[int] | None,
    chat: bool,
    system: str | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    seed: int | None,
    device: str | None,
    activations: str,
    as_json: bool,
    show_stats: bool,
) -> None:
    """Continue a prompt with the canonical checkpoint in OUT, which `qconvert` wrote.

    Example: python -m runtime.generate OUT --prompt "Once upon a time" --max-new-tokens 50
    """
    if (prompt is None) == (prompt_ids is None):
        raise click.UsageError("expected one of --prompt and --prompt-ids")
    if prompt == "" or prompt_ids == []:
        raise click.UsageError("expected a prompt that is not empty")
    if chat and prompt is None:
        raise click.UsageError("--chat needs --prompt")
    if system is not None and not chat:
        raise click.UsageError("--system needs --chat")

    # Read when torch is imported.  Threads that wait by spinning make small models several times slower on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise click.UsageError("--device cuda: torch finds no CUDA device here")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")

    from runtime.decode import generate_tokens
    from runtime.loader import load_model
    from runtime.tokenizer import TextStream, declared_eos_ids

    started = time.perf_counter()
    tokenizer = _open_tokenizer(out, required=prompt is not None)
    ids = _encode(tokenizer, prompt, prompt_ids, chat, system)
    model = load_model(out, device=device, activations=activations)
    loaded = time.perf_counter()
    declared = model.architecture.eos_token_id
    eos_ids = tokenizer.eos_ids(declared) if tokenizer else declared_eos_ids(out, declared)
    try:
        tokens = generate_tokens(model, torch.tensor(ids), max_new_tokens, temperature, top_p, top_k, seed, eos_ids)
    except ValueError as error:
        raise click.UsageError(str(error)) from None

    stream = TextStream(tokenizer) if tokenizer else None
    generated: list[int] = []
    text = ""
    first = loaded
    for token in tokens:
        assert isinstance(token, int)
        generated.append(token)
        if len(generated) == 1:
            first = time.perf_counter()
        ended = token in eos_ids
        piece = stream.push(token) if stream and not ended else "" if stream else f"{token} "
        text += piece
        if not as_json:
            click.echo(piece, nl=False)
    if stream:
        text += (rest := stream.finish())
        if not as_json:
            click.echo(rest, nl=False)
    finished = time.perf_counter()

    stats = {
        "load_s": round(loaded - started, 4),
        "first_token_s": round(first - loaded, 4),
        "tokens_per_s": round((len(generated) - 1) / (finished - first), 2) if len(generated) > 1 else None,
        "peak_memory_mb": round(_peak_memory_mb(model), 1),
    }
    if as_json:
        result: dict[str, Any] = {
            "text": text if stream else None,
            "token_ids": generated,
            "prompt_token_ids": ids,
            "finish_reason": "stop" if generated and generated[-1] in eos_ids else "length",
            "stats": stats,
        }
        click.echo(json.dumps(result, ensure_ascii=False))
    else:
        click.echo()
    if show_stats:
        click.echo(" ".join(f"{name}={value}" for name, value in stats.items()), err=True)


def _open_tokenizer(directory: str, required: bool) -> ChatTokenizer | None:
    """The tokenizer, or None where raw ids need none and there is none."""
    from runtime.tokenizer import ChatTokenizer

    try:
        return ChatTokenizer(directory)
    except LoadError:
        if required:
            raise
        return None


def _encode(
    tokenizer: ChatTokenizer | None, prompt: str | None, prompt_ids: list[int] | None, chat: bool, system: str | None
) -> list[int]:
    if prompt is None or tokenizer is None:
        return prompt_ids or []
    if not chat:
        ids = tokenizer.encode(prompt)
    else:
        messages = [{"role": "system", "content": system}] if system is not None else []
        ids = tokenizer.encode_chat([*messages, {"role": "user", "content": prompt}])
    if not ids:
        raise click.UsageError("expected a prompt of at least one token; the tokenizer gives none for this text")
    return ids


def _peak_memory_mb(model: CausalLM) -> float:
    """Most memory used so far, in 10**6 bytes: of the GPU where the model is there, else resident in this process."""
    import torch

    if model.device.type == "cuda":
        return torch.cuda.max_memory_allocated(model.device) / 1e6
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def run() -> int:
    """Run the command and return its exit code: 0, 1 for a refused checkpoint, 2 for usage, 3 for the machine, 130."""
    try:
        main.main(prog_name="python -m runtime.generate", standalone_mode=False)
    except click.ClickException as error:
        click.echo(f"error: {error.format_message()} (see --help)", err=True)
        return error.exit_code
    except (LoadError, FormatError) as error:
        click.echo(f"error: {error}", err=True)
        return 1
    except (click.Abort, KeyboardInterrupt):
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except (OSError, MemoryError) as error:
        click.echo(f"error: {error}", err=True)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(run())
