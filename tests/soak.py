"""Trains a tiny run in odd circumstances, and checks what docs/reliability.md promises.

    make soak ARGS="--minutes 60 --seed 7"

A round starts train.py and does one thing to it: kills it, its data workers or its process group;
limits the size of its files, as a full disk does; damages a file of the run or of the token cache;
or gives it an odd text, number or path. Whatever happens, the program must end within two minutes
without a traceback, an error must be one sentence, and a run that can go on must end with exactly
the losses of an undisturbed run. Prints what it tried; ends with status 1 at the first failure.
"""

import json
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).parents[1]
TINY = shlex.split("""
--train.steps 12 --train.log-every 1 --train.checkpoint-every 3 --train.evaluate-every 6
--train.evaluate-tokens 256 --optimizer.warmup-steps 3 --model.width 32 --model.layers 2
--model.feed-forward 32 --model.attention.heads 2 --model.attention.kv-heads 1
--model.attention.head-width 16 --memory.rows-per-head 2000 2000 --memory.heads 2
--data.sequence-length 32 --data.batch-size 4""")
SECONDS = 120  # the maximum for a program, which imports JAX and compiles


@dataclass
class Ended:
    """How a program ended."""

    status: int
    errors: str


class Failure(Exception):
    """Something was not as promised."""


class Soak:
    """A folder with texts, a token cache, and the losses of an undisturbed run."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        words = [f"word{number}" for number in range(300)]
        texts = [" ".join(self.random.choices(words, k=200)) for _ in range(60)]
        self.texts = folder / "texts.jsonl"
        self.texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        self.tried: Counter[str] = Counter()
        self.run = folder / "undisturbed"
        self.expect(self.train(), 0)
        self.losses = self.read_losses()

    def start(self, *flags: str, limit: int | None = None) -> "subprocess.Popen[str]":
        """Starts train.py in a process group of its own."""
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "xla"),
        }
        sources = ["--data.sources", str(self.texts), "--data.held-out", "0.2"]
        cache = ["--data.cache", str(self.folder / "tokens")]
        words = ["--run", str(self.run), *TINY, *sources, *cache, *flags]

        def set_limit() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        return subprocess.Popen(
            [sys.executable, "train.py", *words],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
            preexec_fn=None if limit is None else set_limit,
        )

    def train(self, *flags: str, limit: int | None = None) -> Ended:
        """Runs train.py to its end."""
        return self.wait(self.start(*flags, limit=limit))

    def wait(self, program: "subprocess.Popen[str]") -> Ended:
        """Waits for a program, and checks that it says at most one sentence."""
        try:
            _, errors = program.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired as error:
            os.killpg(program.pid, signal.SIGKILL)
            raise Failure(f"it did not end within {SECONDS} s") from error
        if "Traceback" in errors or "Segmentation" in errors:
            raise Failure(errors)
        if program.returncode in (1, 2) and len(re.findall(r"(?m)(?:^|\r)error: ", errors)) != 1:
            raise Failure(f"not one sentence: {errors}")
        # 1: the loss is not finite.
        if program.returncode not in (0, 1, 2, 130, -signal.SIGKILL, -signal.SIGTERM):
            raise Failure(f"status {program.returncode}: {errors}")
        return Ended(program.returncode, errors)

    def expect(self, ended: Ended, *statuses: int) -> None:
        """Checks the status of a program."""
        if ended.status not in statuses:
            raise Failure(f"status {ended.status}, not {statuses}: {ended.errors}")

    def read_losses(self) -> list[tuple[int, float]]:
        """Step and loss of each logged step of the run."""
        lines = map(json.loads, (self.run / "metrics.jsonl").read_text().splitlines())
        return [(line["step"], line["loss"]) for line in lines if line["kind"] == "train"]

    def finish(self, *flags: str) -> None:
        """Resumes the run, and compares its losses with those of the undisturbed run."""
        self.expect(self.train(*flags), 0)
        if self.read_losses() != self.losses:
            raise Failure(f"other losses: {self.read_losses()}")

    def disturb(self, act: Callable[["subprocess.Popen[str]"], None], *flags: str) -> Ended:
        """Starts a run, does something to it after up to 15 seconds, and waits for its end."""
        program = self.start(*flags)
        time.sleep(self.random.uniform(0, 15))
        if program.poll() is None:
            act(program)
        return self.wait(program)

    def kill(self) -> None:
        """SIGKILL to the program, up to three times."""
        for _ in range(self.random.randint(1, 3)):
            self.disturb(lambda program: os.kill(program.pid, signal.SIGKILL))
        self.finish()

    def terminate_group(self) -> None:
        """SIGTERM to the program and its data workers."""
        workers = ["--data.workers", str(self.random.randint(0, 2))]
        ended = self.disturb(lambda program: os.killpg(program.pid, signal.SIGTERM), *workers)
        self.expect(ended, 0, 130, -signal.SIGTERM)
        self.finish()

    def kill_worker(self) -> None:
        """SIGKILL to one or all data workers."""

        def act(program: "subprocess.Popen[str]") -> None:
            command = ["pgrep", "-P", str(program.pid), "-f", "spawn_main"]
            found = subprocess.run(command, capture_output=True, text=True).stdout.split()
            for child in self.random.sample(found, self.random.randint(0, len(found))):
                os.kill(int(child), signal.SIGKILL)

        self.expect(self.disturb(act, "--data.workers", "2"), 0)
        self.finish()

    def limit_files(self) -> None:
        """No file may exceed a random size, as on a full disk."""
        limit = int(10 ** self.random.uniform(1, 7))
        self.expect(self.train(limit=limit), 0, 2)
        self.finish()

    def damage(self) -> None:
        """A random file of a stopped run or of the token cache is cut, zeroed, flipped or gone."""
        self.disturb(lambda program: os.kill(program.pid, signal.SIGTERM))
        files = [
            path
            for folder in (self.run, self.folder / "tokens")
            for path in folder.rglob("*")
            # A flipped bit of a token id has no effect on the form of the cache.
            if path.is_file() and path.name not in ("metrics.jsonl", "ids.bin")
        ]
        if not files:  # it was stopped before it wrote any
            return self.finish()
        path = self.random.choice(files)
        content = bytearray(path.read_bytes())
        how = self.random.choice(["cut", "zeros", "flip", "gone", "garbage"])
        if how == "gone":
            path.unlink()
        else:
            place = self.random.randrange(len(content) + 1)
            if how == "flip" and content:
                content[min(place, len(content) - 1)] ^= 1 << self.random.randrange(8)
            new = {
                "cut": content[:place],
                "zeros": bytes(len(content)),
                "flip": content,
                "garbage": self.random.randbytes(len(content)),
            }[how]
            path.write_bytes(new)
        ended = self.train()
        self.expect(ended, 0, 2)
        if ended.status == 0 and self.read_losses() != self.losses:
            raise Failure(f"{path.relative_to(self.folder)} ({how}) gave other losses")
        shutil.rmtree(self.folder / "tokens")

    def odd_text(self) -> None:
        """A source of odd content."""
        parts = [
            *(
                "\0",
                "\u2585",
                "\u2581",
                "\n",
                "</s>",
                "<s>",
                "\ufeff",
                "日本",
                "a" * 5000,
                "\\ud800",
            ),
            *(
                '{"text": "a b c"}\n',
                '{"text": 3}\n',
                '{"text": "',
                "null\n",
                "[]\n",
                "\u202e",
                "é",
            ),
        ]
        content = "".join(self.random.choices(parts, k=self.random.randint(0, 40))).encode()
        if self.random.random() < 0.3:
            content += self.random.randbytes(self.random.randint(1, 300))
        endings = ["txt", "jsonl", "jsonl.gz", "jsonl.xz", "jsonl.zst", "parquet", "array_record"]
        path = self.folder / f"odd.{self.random.choice(endings)}"
        path.write_bytes(content)
        self.expect(self.train("--data.sources", str(self.texts), str(path)), 0, 2)

    def odd_number(self) -> None:
        """An odd value of a random field."""
        fields = """train.steps train.seed train.accumulation model.width model.layers memory.heads
        memory.row-width memory.init-scale memory.hash-seed optimizer.learning-rate optimizer.eps
        optimizer.warmup-steps optimizer.clip-norm optimizer.weight-decay data.held-out
        data.sequence-length data.batch-size memory.adam.factor memory.adam.b1 memory.adam.b2
        model.attention.theta model.norm-epsilon mesh.fsdp train.keep-checkpoints"""
        values = "0 -1 1 nan inf -inf 1e-60 1e38 1e400 10000000000000000000000 x 0x10 1e3 ''"
        field, value = self.random.choice(fields.split()), self.random.choice(values.split())
        if field in ("model.width", "model.layers", "memory.heads") and value == "1e3":
            return
        self.expect(self.train(f"--{field}", value), 0, 1, 2)

    def odd_path(self) -> None:
        """A run folder with an odd name."""
        names = [
            "seed[1]",
            "a\\b",
            "a*b",
            "ü",
            "a b",
            "a\nb",
            "-x",
            "x" * 255,
            "x" * 300,
            "a?b",
            ".",
        ]
        self.run = self.folder / "odd" / self.random.choice(names)
        ended = self.train()
        self.expect(ended, 0, 2)
        if ended.status == 0:
            self.finish()

    def round(self, number: int) -> None:
        """One random disturbance."""
        kinds = [self.kill, self.terminate_group, self.kill_worker, self.limit_files]
        kinds += [self.damage, self.odd_text, self.odd_number, self.odd_path]
        act = self.random.choice(kinds)
        self.run = self.folder / f"run{number}"
        self.tried[act.__name__] += 1
        act()
        shutil.rmtree(self.run, ignore_errors=True)


def main(minutes: float = 20.0, seed: int | None = None) -> None:
    """Disturbs runs for some minutes.

    Args:
        minutes: how long.
        seed: of the disturbances; by default, another one each time.
    """
    seed = int(time.time()) if seed is None else seed
    end, number = time.monotonic() + 60 * minutes, 0
    print(f"seed {seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(Path(folder), seed)
        while time.monotonic() < end:
            number += 1
            try:
                soak.round(number)
            except Failure as failure:
                sys.exit(f"Round {number} of seed {seed} failed: {failure}")
            print(f"{number}: {dict(soak.tried)}", flush=True)
    print(f"{number} rounds without a failure: {dict(soak.tried)}")


if __name__ == "__main__":
    tyro.cli(main)
