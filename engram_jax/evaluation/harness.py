"""Tasks of lm-evaluation-harness, with the weights of a run (needs the extra lm-eval)."""

import logging
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from lm_eval import evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, make_table

from engram_jax.decoding.generate import Generator
from engram_jax.decoding.score import TextScorer
from engram_jax.decoding.settings import GenerationSettings
from engram_jax.errors import InputError
from engram_jax.files import expand_home

SHIPPED = Path(__file__).parent / "tasks"
FEWSHOT_SEED = 1234  # of the harness's own command
RESAMPLES = 1000  # for the standard errors of metrics that are not means

type Requests = Sequence[Any]  # `lm_eval.api.instance.Instance`


class HarnessModel(TemplateLM):
    """A run as a model of the harness: `lm_eval.simple_evaluate(model=HarnessModel(generator))`.

    Every text is the start of a document. Texts are not shortened to the trained length, except
    for `loglikelihood_rolling`.

    Args:
        generator: of the run.
    """

    def __init__(self, generator: Generator) -> None:
        super().__init__()
        self.generator, self.scorer = generator, TextScorer(generator)
        self.max_length = generator.program.config.data.sequence_length

    @property
    def eot_token_id(self) -> int:
        """The id at the end of a document."""
        return self.generator.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The id at the start of a document."""
        return self.generator.tokenizer.bos_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: object
    ) -> list[int]:
        """The token ids of a text, after the id at the start of a document unless it is refused."""
        before = [] if add_special_tokens is False else [self.prefix_token_id]
        return before + self.generator.tokenizer.encode(string).tolist()

    def loglikelihood(
        self, requests: Requests, disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """For pairs of context and continuation; see `TextScorer.score`.

        `TemplateLM` would give a continuation without tokens of its own the likelihood 1.
        """
        found = self.scorer.score([request.args for request in requests])
        return [(of_one.log_probability, of_one.is_greedy) for of_one in found]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: object
    ) -> list[tuple[float, bool]]:
        rows = [context + continuation for _, context, continuation in requests]
        found = self.scorer.score_tokens(rows, [len(context) for _, context, _ in requests])
        return [(of_one.log_probability, of_one.is_greedy) for of_one in found]

    def loglikelihood_rolling(self, requests: Requests, disable_tqdm: bool = False) -> list[float]:
        """For texts, without their ends, in windows of the trained length."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            for pair in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                windows.append((None, *make_disjoint_window(pair)))
                owners.append(number)
        sums = [0.0] * len(requests)
        for owner, (found, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            sums[owner] += found
        return sums

    def generate_until(self, requests: Requests, disable_tqdm: bool = False) -> list[str]:
        """For pairs of context and `generation_kwargs`; texts end before the string in `until`."""
        numbers: dict[GenerationSettings, list[int]] = {}
        for number, request in enumerate(requests):
            numbers.setdefault(_settings(request.args[1]), []).append(number)
        texts: dict[int, str] = {}
        for settings, of_settings in numbers.items():
            prompts = [requests[number].args[0] for number in of_settings]
            found = self.generator.generate(prompts, settings)
            texts |= {n: of_one.text for n, of_one in zip(of_settings, found, strict=True)}
        return [texts[number] for number in range(len(requests))]


def _settings(generation_kwargs: dict[str, Any]) -> GenerationSettings:
    try:
        given: dict[str, Any] = normalize_gen_kwargs(generation_kwargs)
        return GenerationSettings(
            tokens=given["max_gen_toks"],
            temperature=float(given.get("temperature", 1.0)) if given["do_sample"] else 0.0,
            top_k=int(given.get("top_k", 0)) or None,
            top_p=float(given.get("top_p", 1.0)),
            min_p=float(given.get("min_p", 0.0)),
            stop=tuple(text for text in given["until"] if text),
        )
    except (InputError, TypeError, ValueError) as error:
        raise InputError(
            f"The generation_kwargs {generation_kwargs} of a task are not valid ({error})."
        ) from error


def load_tasks(names: Sequence[str]) -> dict[str, Any]:
    """Loads tasks with their documents, for `run_tasks`.

    Args:
        names: shipped tasks, or YAML files of tasks or groups.

    Raises:
        InputError: a task does not exist or cannot be loaded, or two have the same name.
    """
    # It warns of nothing that the user of a task can change.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=SHIPPED, include_defaults=False)
    loaded: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in names:
        if name not in manager.all_tasks and not expand_home(name).is_file():
            raise InputError(
                f"There is no task {name!r}; give a YAML file, or {', '.join(manager.all_tasks)}."
            )
        try:
            found = manager.load(name)
        except Exception as error:  # errors of YAML, templates, data and functions have many types
            raise InputError(
                f"Task {name} cannot be loaded ({_reason(error)}); correct the file, whose "
                "data must be local, because nothing is downloaded."
            ) from error
        if again := loaded["tasks"].keys() & found["tasks"].keys():
            raise InputError(f"Two tasks are called {min(again)!r}; give one, or rename it.")
        for part, values in loaded.items():
            values |= found[part]
    return loaded


def _reason(error: BaseException) -> str:
    """The first line of an error that says something, of the last of its causes that does."""
    if isinstance(error, StopIteration):
        return "its data has no examples"
    causes = [error]
    while cause := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(cause)
    lines = [str(one).strip().splitlines() for one in reversed(causes)]
    said = [line[0] for line in lines if line and line[0] != "None"]
    return (said or [type(error).__name__])[0].rstrip(".")


def run_tasks(generator: Generator, loaded: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Scores a run on loaded tasks.

    Returns:
        The harness's results, without samples, as JSON-serializable values; and a table of them.

    Raises:
        InputError: a text of a task is too long or not valid Unicode, its generation_kwargs are not
            valid, or logits are not finite.
    """
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(FEWSHOT_SEED)
    # It resamples in forked processes, which can hang because JAX has threads.
    os.environ["DISABLE_MULTIPROC"] = "1"
    with redirect_stdout(sys.stderr):
        found = evaluate(
            HarnessModel(generator), loaded, bootstrap_iters=RESAMPLES, log_samples=False
        )
    kept = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better")
    return {part: found[part] for part in kept if part in found}, str(make_table(found)).strip()
