"""Command line of `python -m runtime.generate`, nothing else."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from runtime.answer import Answer, answer_together
from runtime.command import (
    INPUT_FILE,
    activations_option,
    device_option,
    import_torch,
    out_argument,
    peak_memory_mb,
    progress,
    read_text,
    run,
)
from runtime.errors import InputError, LoadError
from runtime.generation_config import declared_eos_ids, read_generation_config
from runtime.prompts import Chat, Prompt, encode, read_messages, read_prompts

if TYPE_CHECKING:
    from runtime.decode import Drawn
    from runtime.models.base import CausalLM
    from runtime.sampling import Sampling
    from runtime.speculate import Counts
    from runtime.tokenizer import ChatTokenizer

MAX_NEW_TOKENS = 128
WINDOW = 16  # batches among which prompts of like length are put together; answers wait no longer than that


@dataclass(frozen=True, slots=True)
class Settings:
    """What holds for every answer."""

    sampling: Sampling
    max_new_tokens: int
    eos_ids: frozenset[int]
    stop: tuple[str, ...]
    logprobs: int | None
    guesses: int | None = None  # per call, with speculation
    counts: Counts | None = None  # how speculation went


def _token_ids(context: click.Context, parameter: click.Parameter, value: str | None) -> list[int] | None:
    if value is None:
        return None
    try:
        return [int(part) for part in value.split(",")]
    except ValueError:
        raise click.BadParameter("expected comma-separated token ids such as 1,2,3") from None


def _variables(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, Any]:
    variables = {}
    for entry in values:
        name, equals, text = entry.partition("=")
        if not name.isidentifier() or not equals:
            raise click.BadParameter(f"expected NAME=VALUE such as enable_thinking=false, found {entry!r}")
        if name in ("messages", "add_generation_prompt"):
            raise click.BadParameter(f"{name} is set by this command")
        try:
            variables[name] = json.loads(text)
        except ValueError:
            variables[name] = text
    return variables


def _stops(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    if "" in values:
        raise click.BadParameter("expected text that is not empty")
    return values


def _speculation(context: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    """Guesses per call; 0: as many as there are draft heads."""
    if value is None:
        return None
    kind, _, count = value.partition(":")
    if kind != "mtp" or (count and not count.isdecimal()) or value.endswith(":") or count == "0":
        raise click.BadParameter("expected mtp, or mtp:N with N guesses of 1 or more")
    return int(count or 0)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@out_argument
@click.option("--prompt", help="Text to continue; with --chat, the user's message.")
@click.option("--prompt-ids", callback=_token_ids, help="Token ids to continue, such as 1,2,3; needs no tokenizer.")
@click.option(
    "--messages", type=INPUT_FILE, help="Conversation to continue: a JSON list of {role, content}; -: standard input."
)
@click.option(
    "--prompt-file",
    type=INPUT_FILE,
    help="Many prompts: JSON lines with prompt, messages or prompt_ids, and perhaps id, max_new_tokens, stop.",
)
@click.option("--output", type=click.Path(dir_okay=False), help="With --prompt-file: where JSON lines go, in the same order.")
@click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True, help="With --prompt-file.")
@click.option("--chat", is_flag=True, help="Put prompts of text into the checkpoint's chat template.")
@click.option("--system", help="System message, with --chat.")
@click.option("--template-var", multiple=True, callback=_variables, help="NAME=VALUE for the chat template; may repeat.")
@click.option("--thinking/--no-thinking", default=None, help="Short for --template-var enable_thinking=true or false.")
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    help=f"Default: the checkpoint's, or {MAX_NEW_TOKENS}.",
)
@click.option("--stop", multiple=True, callback=_stops, help="Text that ends the answer and is not shown; may repeat.")
@click.option("--ignore-eos", is_flag=True, help="Go on after end tokens.")
@click.option("--temperature", type=click.FloatRange(min=0), help="0: most likely token.  Default: the checkpoint's, or 0.")
@click.option(
    "--top-p", type=click.FloatRange(min=0, max=1, min_open=True), help="Default: the checkpoint's, or 1: all tokens."
)
@click.option("--top-k", type=click.IntRange(min=0), help="Default: the checkpoint's, or 0: all tokens.")
@click.option("--min-p", type=click.FloatRange(min=0, max=1), help="Default: the checkpoint's, or 0: all tokens.")
@click.option("--repetition-penalty", type=click.FloatRange(min=0, min_open=True), help="Default: the checkpoint's, or 1.")
@click.option("--seed", type=click.IntRange(min=0, max=2**63 - 1), help="Repeat a draw; default: a new one each time.")
@device_option
@activations_option
@click.option(
    "--speculate",
    callback=_speculation,
    metavar="mtp[:N]",
    help="Let the checkpoint's draft heads guess N tokens per call: the same text, sooner.  Prompts run one at a time.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end instead of streaming.")
@click.option(
    "--logprobs",
    type=click.IntRange(min=0),
    is_flag=False,
    flag_value="0",
    metavar="[N]",
    help="With --json or --prompt-file: log-probabilities, and those of the N most likely tokens.",
)
@click.option("--stats", "show_stats", is_flag=True, help="Print times and memory to standard error.")
def main(
    out: str,
    prompt: str | None,
    prompt_ids: list[int] | None,
    messages: str | None,
    prompt_file: str | None,
    output: str | None,
    batch_size: int,
    chat: bool,
    system: str | None,
    template_var: dict[str, Any],
    thinking: bool | None,
    max_new_tokens: int | None,
    stop: tuple[str, ...],
    ignore_eos: bool,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    min_p: float | None,
    repetition_penalty: float | None,
    seed: int | None,
    device: str | None,
    activations: str,
    speculate: int | None,
    as_json: bool,
    logprobs: int | None,
    show_stats: bool,
) -> None:
    """Continue a prompt with the canonical checkpoint in OUT, which `qconvert` wrote.

    Example: python -m runtime.generate OUT --prompt "Once upon a time" --max-new-tokens 50
    """
    sources = {"--prompt": prompt, "--prompt-ids": prompt_ids, "--messages": messages, "--prompt-file": prompt_file}
    source = [name for name, value in sources.items() if value is not None]
    if len(source) != 1:
        raise click.UsageError("expected one of --prompt and --prompt-ids, or --messages, or --prompt-file")
    if prompt == "" or prompt_ids == []:
        raise click.UsageError("expected a prompt that is not empty")
    if chat and prompt is None and prompt_file is None:
        raise click.UsageError("--chat needs --prompt or --prompt-file")
    if system is not None and not chat:
        raise click.UsageError("--system needs --chat")
    if (template_var or thinking is not None) and (prompt_ids is not None or (prompt is not None and not chat)):
        raise click.UsageError("--template-var and --thinking need --chat or --messages")
    if output is not None and prompt_file is None:
        raise click.UsageError("--output needs --prompt-file")
    if logprobs is not None and not as_json and prompt_file is None:
        raise click.UsageError("--logprobs needs --json or --prompt-file")

    prompts = _read(prompt, prompt_ids, messages, prompt_file)
    variables = template_var | ({} if thinking is None else {"enable_thinking": thinking})
    device = import_torch(device)
    started = time.perf_counter()
    stops = bool(stop) or any(one.stop for one in prompts)
    tokenizer = _open_tokenizer(out, stops or any(one.needs_tokenizer for one in prompts))
    try:
        ids = _encode(out, prompts, tokenizer, Chat(chat, system, variables))
    except InputError as error:
        if source[0] in ("--prompt", "--prompt-ids"):
            raise click.UsageError(str(error)) from None
        raise
    declared = read_generation_config(out)
    try:
        sampling = declared.sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    except LoadError:
        raise
    except ValueError as error:
        raise click.UsageError(str(error)) from None

    from runtime.ahead import Use
    from runtime.loader import load_model, memory_note

    limit = max_new_tokens or declared.max_new_tokens or MAX_NEW_TOKENS
    first = sorted(len(row) for row in ids[: WINDOW * batch_size])[:batch_size]  # the first batch
    uses = [Use(tuple(first), first[-1] + limit, sampling, logprobs)] if first and speculate is None else []
    with _open_output(output, prompt_file) as file:
        model = load_model(out, device=device, activations=activations, drafts=speculate is not None, uses=uses)
        loaded = time.perf_counter()
        if note := memory_note(model):
            click.echo(f"warning: {note}", err=True)
        ends = model.architecture.eos_token_id
        eos_ids = tokenizer.eos_ids(ends) if tokenizer else declared_eos_ids(out, ends)
        settings = Settings(
            sampling,
            limit,
            frozenset() if ignore_eos else eos_ids,
            stop,
            logprobs,
            *_guesses(model, speculate),
        )
        if prompt_file is not None:
            stats = _answer_all(model, tokenizer, prompts, ids, settings, batch_size, file)
        else:
            stats = _answer_one(model, tokenizer, ids[0], settings, as_json, loaded - started)
    if settings.counts:
        stats |= {"guessed": settings.counts.guessed, "kept": settings.counts.kept}
    if show_stats:
        stats = {"load_s": round(loaded - started, 4)} | stats | {"peak_memory_mb": round(peak_memory_mb(model.device), 1)}
        click.echo(" ".join(f"{name}={value}" for name, value in stats.items()), err=True)


def _read(prompt: str | None, prompt_ids: list[int] | None, messages: str | None, prompt_file: str | None) -> list[Prompt]:
    if prompt_file is not None:
        text, name = read_text(prompt_file)
        return read_prompts(text.split("\n"), name)
    if messages is not None:
        return [read_messages(*read_text(messages))]
    return [Prompt("--prompt", prompt) if prompt is not None else Prompt("--prompt-ids", prompt_ids or [])]


def _open_tokenizer(directory: str, required: bool) -> ChatTokenizer | None:
    """The tokenizer, or None where it is not required and there is none."""
    from runtime.tokenizer import ChatTokenizer

    try:
        return ChatTokenizer(directory)
    except LoadError:
        if required:
            raise
        return None


def _encode(out: str, prompts: Sequence[Prompt], tokenizer: ChatTokenizer | None, chat: Chat) -> list[list[int]]:
    """The ids of every prompt, checked against the checkpoint's config before its weights are read."""
    from runtime.decode import check_prompt
    from runtime.loader import read_config

    architecture = read_config(Path(out)).architecture
    found = []
    for prompt in prompts:
        ids = encode(prompt, tokenizer, chat)
        try:
            check_prompt(ids, architecture["vocab_size"], architecture["max_position_embeddings"])
        except ValueError as error:
            raise InputError(f"{prompt.where}: {error}") from None
        found.append(ids)
    return found


def _open_output(output: str | None, prompt_file: str | None) -> Any:
    """Where answers go; opened before anything is loaded, so that a name that cannot be written is found at once.

    Half a surrogate pair, in an `id` that is given back, is written as its escape, which JSON has too.
    """
    if output is None:
        return click.open_file("-", "w", encoding="utf-8", errors="backslashreplace")
    if prompt_file is not None and prompt_file != "-" and Path(output).exists() and Path(output).samefile(prompt_file):
        raise click.UsageError("--output: expected another file than --prompt-file")
    try:
        return Path(output).open("w", encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise click.UsageError(f"--output {output}: {error.strerror}") from None


def _guesses(model: CausalLM, asked: int | None) -> tuple[int | None, Counts | None]:
    """Guesses per call, and what counts them."""
    if asked is None:
        return None, None
    from runtime.speculate import Counts, check_ahead

    guesses = asked or len(model.drafts)
    try:
        check_ahead(model, guesses)
    except ValueError as error:
        raise click.UsageError(f"--speculate mtp:{guesses}: {error}") from None
    return guesses, Counts()


def _draw(model: CausalLM, ids: Sequence[int], settings: Settings) -> Iterator[Drawn]:
    """The tokens that follow one prompt, from whatever makes them."""
    import torch

    from runtime.decode import Decoding

    if settings.guesses is not None:
        from runtime.speculate import speculate

        return speculate(
            model,
            torch.tensor(ids),
            settings.sampling,
            settings.max_new_tokens,
            settings.guesses,
            settings.eos_ids,
            settings.logprobs,
            settings.counts,
        )
    decoding = Decoding(
        model, [torch.tensor(ids)], settings.sampling, settings.max_new_tokens, settings.eos_ids, logprobs=settings.logprobs
    )
    return (drawn for step in decoding for drawn in step if drawn)


def _answer_one(
    model: CausalLM, tokenizer: ChatTokenizer | None, ids: Sequence[int], settings: Settings, as_json: bool, load_s: float
) -> dict[str, Any]:
    """Show one answer as it comes, or as JSON at the end; returns its times."""
    answer = Answer(tokenizer, settings.eos_ids, settings.stop)
    began = time.perf_counter()
    first = None
    for piece in answer.follow(_draw(model, ids, settings)):
        first = first or time.perf_counter()
        if not as_json:
            click.echo(piece, nl=False)
    finished = time.perf_counter()
    count = len(answer.drawn)
    stats = {
        "first_token_s": round((first or finished) - began, 4),
        "tokens_per_s": round((count - 1) / (finished - (first or began)), 2) if count > 1 else None,
    }
    if as_json:
        memory = {"peak_memory_mb": round(peak_memory_mb(model.device), 1)}
        result = answer.as_json(settings.logprobs is not None) | {"prompt_token_ids": list(ids)}
        click.echo(json.dumps(result | {"stats": {"load_s": round(load_s, 4)} | stats | memory}, ensure_ascii=False))
    else:
        click.echo()
    return stats


def _answer_all(
    model: CausalLM,
    tokenizer: ChatTokenizer | None,
    prompts: Sequence[Prompt],
    ids: Sequence[Sequence[int]],
    settings: Settings,
    batch_size: int,
    file: IO[str],
) -> dict[str, Any]:
    """Write one JSON line per prompt, in their order; returns the times.

    Prompts of like length make up a batch.  Prompt i is drawn with seed + i, whatever batch it is in.
    """
    began = time.perf_counter()
    seeds = settings.sampling.seeds(len(prompts))
    tokens = 0
    with progress(len(prompts), "prompt") as bar:
        for start in range(0, len(prompts), WINDOW * batch_size):
            window = range(start, min(start + WINDOW * batch_size, len(prompts)))
            by_length = sorted(window, key=lambda row: len(ids[row]))
            answers: dict[int, Answer] = {}
            for at in range(0, len(by_length), batch_size):
                rows = by_length[at : at + batch_size]
                done = _answer_batch(model, tokenizer, [prompts[r] for r in rows], [ids[r] for r in rows], settings,
                                     [seeds[r] for r in rows])  # fmt: skip
                answers.update(zip(rows, done, strict=True))
                bar.update(len(rows))
            for row in window:
                tokens += len(answers[row].drawn)
                result = {"id": prompts[row].id} | answers[row].as_json(settings.logprobs is not None)
                file.write(json.dumps(result, ensure_ascii=False) + "\n")
            file.flush()
    elapsed = time.perf_counter() - began
    return {"prompts": len(prompts), "total_s": round(elapsed, 4), "tokens_per_s": round(tokens / elapsed, 2)}


def _answer_batch(
    model: CausalLM,
    tokenizer: ChatTokenizer | None,
    prompts: Sequence[Prompt],
    ids: Sequence[Sequence[int]],
    settings: Settings,
    seeds: Sequence[int | None],
) -> list[Answer]:
    """The answers of prompts that are continued together."""
    import torch

    from runtime.decode import Decoding

    limits = [prompt.max_new_tokens or settings.max_new_tokens for prompt in prompts]
    stops = [settings.stop if prompt.stop is None else prompt.stop for prompt in prompts]
    answers = [Answer(tokenizer, settings.eos_ids, stop) for stop in stops]
    if settings.guesses is not None:
        for answer, row, limit, seed in zip(answers, ids, limits, seeds, strict=True):
            sampling = replace(settings.sampling, seed=seed)
            for _ in answer.follow(_draw(model, row, replace(settings, sampling=sampling, max_new_tokens=limit))):
                pass
        return answers
    inputs = [torch.tensor(row) for row in ids]
    decoding = Decoding(model, inputs, settings.sampling, limits, settings.eos_ids, seeds, settings.logprobs)
    answer_together(decoding, answers)
    return answers


if __name__ == "__main__":
    sys.exit(run(main, "runtime.generate"))
