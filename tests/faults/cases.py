"""Every fault of the campaign: how it is made, what is promised, and the proof that it was kept."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pyarrow.parquet as pq

from speedbench import store
from tests.faults.scene import LENGTH, Ended, K, Scene, small_disk


@dataclass(frozen=True, slots=True)
class Fault:
    """`happen` makes it, raises AssertionError where a promise is broken, and says what was seen.

    n_quick, n_full  how often it is tried in the quick form, and by the whole campaign
    """

    name: str
    promised: str
    happen: Callable[[Scene], str]
    n_full: int = 5
    n_quick: int = 1


def told(scene: Scene, *words: str) -> str:
    """The report, which must hold these words."""
    text = scene.report()
    for word in words:
        assert word in text, f"the report does not say '{word}': {text[:3000]}"
    return text


# ---------------------------------------------------------------- signals


def signalled(number: signal.Signals, code: int) -> Callable[[Scene], str]:
    def happen(scene: Scene) -> str:
        process = scene.start(slow_ms=40)
        scene.wait_for_part(process)
        time.sleep(scene.random.uniform(0, 0.3))
        process.send_signal(number)
        ended = scene.ended(process)
        assert ended.code == code, ended.err
        assert "Traceback" not in ended.err
        assert "--resume" in ended.err
        assert scene.status() == "partial"
        told(scene, f"{number.name} was received")
        return f"exit code {code}; {scene.resumed(scene.answers())}"

    return happen


def interrupted_twice(scene: Scene) -> str:
    process = scene.start(fault="pauses:30")
    scene.wait_for_part(process)
    process.send_signal(signal.SIGINT)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    ended = scene.ended(process)
    assert ended.code == 130, ended.err
    assert "Traceback" not in ended.err
    assert scene.status() == "partial"
    told(scene, "SIGINT was received, at once")
    return f"exit code 130; {scene.resumed(scene.answers())}"


def killed(scene: Scene) -> str:
    """At any moment from the start on, several times in one run."""
    kept, seen = {}, []
    scene.n_rows = 240
    for _ in range(3):
        more = ["--resume"] if (scene.directory / "manifest.json").exists() else []
        n = len(list((scene.directory / "turns").glob("[0-9]*.parquet")))
        process = scene.start(*more, slow_ms=20)
        if scene.random.random() < 0.7:
            scene.wait_for_part(process, n)
        time.sleep(scene.random.uniform(0, 1.2))
        process.kill()
        seen.append(scene.ended(process).code)
        if (scene.directory / "manifest.json").exists():
            now = scene.answers()
            assert {name: now.get(name) for name in kept} == kept, "a stored answer was lost"
            kept = dict(now)
            if seen[-1] == -signal.SIGKILL:
                told(scene, "the run was killed, or is still going on")
    if not (scene.directory / "manifest.json").exists():
        assert scene.run().code == 0
        return "nothing was stored yet; the same command ran anew"
    return f"3 kills; {scene.resumed(kept)}"


def killed_at_operation(scene: Scene) -> str:
    """Between any two of the operations that make files durable, the manifest's among them."""
    n = scene.random.randrange(1, 30)
    ended = scene.run(fault=f"killed-at-operation:{n}")
    assert ended.code in (-signal.SIGKILL, 0)
    if not (scene.directory / "manifest.json").exists():
        again = scene.run()
        assert again.code == 0, again.err
        assert len(scene.answers()) == scene.n_rows
        return "killed before the manifest: the same command ran anew"
    told(scene)
    return f"killed at file operations 1 to 29; {scene.resumed(scene.answers())}"


def stopped_while_hanging(scene: Scene) -> str:
    process = scene.start("--stall_timeout", "0", fault="child-hangs:60", slow_ms=20)
    scene.wait_for_part(process)
    time.sleep(1.0)
    process.send_signal(signal.SIGTERM)
    ended = scene.ended(process)
    assert ended.code == 143, ended.err
    told(scene, "SIGTERM was received; no step came for")
    return f"exit code 143; {scene.resumed(scene.answers())}"


def killed_with_children(scene: Scene) -> str:
    """An engine's process that does not notice its parent's death, as vLLM's do not."""
    process = scene.start("--stall_timeout", "0", fault="child-hangs:60", slow_ms=20)
    scene.wait_for_part(process)
    time.sleep(2.5)  # the guardian looks every second at first
    process.kill()
    scene.ended(process)  # asserts that nobody is left
    told(scene, "the run was killed")
    return f"its process was ended; {scene.resumed(scene.answers())}"


def suspended(scene: Scene) -> str:
    """For longer than an engine may be silent."""
    process = scene.start("--stall_timeout", "2", slow_ms=40)
    scene.wait_for_part(process)
    process.send_signal(signal.SIGSTOP)
    time.sleep(5)
    process.send_signal(signal.SIGCONT)
    ended = scene.ended(process)
    assert ended.code == 0, ended.err
    assert len(scene.answers()) == scene.n_rows
    return f"exit code 0, {scene.n_rows} of {scene.n_rows}"


# ---------------------------------------------------------------- engines that fail


def fails(
    fault: str, code: int, *words: str, err: str = "", stall: str = "1", is_abrupt: bool = False
) -> Callable[..., str]:
    """The run ends by the fault; what had ended before is kept: where the process ends with it
    (`is_abrupt`), what had been stored by then."""

    def happen(scene: Scene) -> str:
        first = 40 if is_abrupt else 8  # polls; by the 40th slow one a part is written
        name = fault.replace("?", str(scene.random.randrange(first, 60)))
        ended = scene.run("--stall_timeout", stall, fault=name, slow_ms=60 if is_abrupt else 0)
        assert ended.code == code, (ended.code, ended.err)
        assert err in ended.err, ended.err
        text = told(scene, *words)
        if "killed" not in text:
            assert scene.status() == "failed"
        kept = scene.answers()
        assert kept or not is_abrupt, "nothing had been stored"
        return f"exit code {code}; {scene.resumed(kept)}"

    return happen


def hung(fault: str, frame: str) -> Callable[[Scene], str]:
    """The stacks must show where."""
    rest = fails(fault, 1)

    def happen(scene: Scene) -> str:
        seen = rest(scene)
        stacks = "".join(p.read_text() for p in sorted((scene.directory / "stalls").iterdir()))
        assert frame in stacks, stacks
        return f"{seen}; the stack shows {frame}"

    return happen


def stalled_twice_reported(scene: Scene) -> str:
    """The stacks of the engine's process are in the report, and the next session may stall, too."""
    log = (scene.folder / "log").open("w")
    for more in ((), ("--resume",)):
        process = scene.start("--stall_timeout", "1", *more, fault="child-hangs:30")
        out, err = process.communicate(timeout=60)
        assert process.returncode == 1, (out, err)
        log.write(err)
        assert "stuck_in_a_collective" in err
    scene.nobody_is_left()
    log.close()
    manifest = store.read_manifest(scene.directory)
    assert [entry["end"] for entry in manifest["sessions"]] == ["stalled", "stalled"]
    page = scene.command("report", str(scene.directory), "--format", "markdown")
    assert "stalls/00000.txt" in page.out
    assert "stalls/00001.txt" in page.out
    assert "_ask_child" in page.out
    return f"exit code 1 twice, both stacks in the report; {scene.resumed(scene.answers())}"


def harmless(fault: str, *words: str) -> Callable[[Scene], str]:
    """The run is whole, and its numbers are those without the fault."""

    def happen(scene: Scene) -> str:
        ended = scene.run(fault=fault)
        assert ended.code == 0, ended.err
        told(scene, *words)
        assert len(scene.answers()) == scene.n_rows
        columns = store.load(scene.directory).columns
        assert int(columns.n_tokens.sum()) == scene.n_rows * LENGTH
        assert int(columns.n_tokens.max()) <= K + 1
        said = f", the report says '{words[0]}'" if words else ""
        return f"exit code 0, {scene.n_rows} of {scene.n_rows} and every token once{said}"

    return happen


def wrong(fault: str, *words: str) -> Callable[[Scene], str]:
    """The run ends, and its report calls the numbers wrong, as an error."""

    def happen(scene: Scene) -> str:
        ended = scene.run(fault=fault)
        assert ended.code == 0, ended.err
        text = told(scene, *words)
        assert text.index("ERROR") < text.index(words[0]) < text.index("In short")
        return f"exit code 0, the report has an error: '{words[0]}'"

    return happen


def no_numbers(fault: str) -> Callable[[Scene], str]:
    """Conversations with something else than numbers fail by name; --resume asks them again."""

    def happen(scene: Scene) -> str:
        ended = scene.run(fault=fault)
        assert ended.code == 0, (ended.code, ended.err)
        kept = scene.answers()
        assert 0 < len(kept) < scene.n_rows
        told(scene, "cannot be stored as numbers", "failed")
        return f"exit code 0, those are told as failed; {scene.resumed(kept)}"

    return happen


def backwards(scene: Scene) -> str:
    seen = wrong("swapped", "the clock runs backwards")(scene)
    page = scene.command("report", str(scene.directory), "--format", "json")
    (arm,) = json.loads(page.out)["arms"]
    (run,) = arm["runs"]
    assert run["timing"]["step_time_s"]["n"] == 0, run["timing"]["step_time_s"]
    return f"{seen}; no step time is given"


# ---------------------------------------------------------------- disks and directories


def full_disk(scene: Scene) -> str:
    disk = scene.folder / "disk"
    scene.n_rows = 600
    with small_disk(disk, "100k"):
        target = disk / "run"
        ended = scene.run("--save_dir", str(target), slow_ms=5)
        assert ended.code == 2, (ended.code, ended.err)
        assert "No space left" in ended.err
        shutil.copytree(target, scene.directory, ignore=shutil.ignore_patterns(".*"))
    kept = scene.answers()
    assert kept
    seen = scene.resumed(kept)
    return f"exit code 2, 'No space left on device'; with space, {seen}"


def full_from_the_start(scene: Scene) -> str:
    disk = scene.folder / "disk"
    with small_disk(disk, "16k"):
        ended = scene.run("--save_dir", str(disk / "run"))
        assert ended.code == 2, (ended.code, ended.err)
        assert "No space left" in ended.err
        assert "starting" not in ended.err
        assert not list(disk.iterdir())
    return "exit code 2 before the engine's start, nothing left behind"


def limited_file_size(scene: Scene) -> str:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (70_000, 70_000))

    scene.length = 2000
    ended = scene.run(before=limit)
    assert ended.code == 2, (ended.code, ended.err)
    assert "--resume" in ended.err
    kept = scene.answers()
    return f"exit code 2; {scene.resumed(kept)}"


def unwritable(place: str) -> Callable[[Scene], str]:
    def happen(scene: Scene) -> str:
        (scene.folder / "file").write_text("")
        target = place.format(folder=scene.folder)
        ended = scene.run("--save_dir", target, "--show_progress")
        assert ended.code == 2, (ended.code, ended.err)
        assert "cannot be written" in ended.err, ended.err
        assert "starting NULL" not in ended.err
        return "exit code 2 before the engine's start"

    return happen


def read_only_mount(scene: Scene) -> str:
    """Of what a part is made of, the last is refused: what came before must not count."""
    disk = scene.folder / "disk"
    with small_disk(disk, "10m"):
        target = disk / "run"
        process = scene.start("--save_dir", str(target), slow_ms=40)
        scene.wait(process, lambda: any((target / "turns").glob("[0-9]*.parquet")))
        turns = str(target / "turns")
        subprocess.run(("mount", "--bind", turns, turns), check=True)
        subprocess.run(("mount", "-o", "remount,bind,ro", turns), check=True)
        ended = scene.ended(process)
        subprocess.run(("umount", "-l", turns), check=True)
        assert ended.code == 2, (ended.code, ended.err)
        assert "Read-only file system" in ended.err, ended.err
        assert "--resume" in ended.err
        shutil.copytree(target, scene.directory)
    return f"exit code 2; {scene.resumed(scene.answers())}"


def moved_away(replaced: bool) -> Callable[[Scene], str]:
    def happen(scene: Scene) -> str:
        process = scene.start(slow_ms=40)
        scene.wait_for_part(process)
        away = scene.folder / "away"
        scene.directory.rename(away)
        if replaced:
            scene.directory.mkdir()
        ended = scene.ended(process)
        assert ended.code == 2, (ended.code, ended.err)
        assert "--resume" in ended.err
        if replaced:
            stored = [p.name for p in scene.directory.rglob("*.parquet")]
            assert not stored, "parts went into a directory that is not the run's"
            shutil.rmtree(scene.directory)
        away.rename(scene.directory)
        told(scene, "the run was killed, or is still going on")
        return f"exit code 2; {scene.resumed(scene.answers())}"

    return happen


def remote_gone(scene: Scene) -> str:
    """The folder behind a file:// URL becomes a file in mid-run."""
    place, cache = scene.folder / "remote", scene.folder / "cache"
    place.mkdir()
    url = f"file://{place}/run"
    process = scene.start("--save_dir", url, slow_ms=40, XDG_CACHE_HOME=str(cache))
    scene.wait(process, lambda: any((place / "run").glob("turns/[0-9]*.parquet")))
    place.rename(scene.folder / "gone")
    place.write_text("")
    ended = scene.ended(process)
    assert ended.code == 1, (ended.code, ended.err)
    assert "speedbench upload" in ended.err or "--resume" in ended.err, ended.err
    (staged,) = [p.parent for p in cache.rglob("manifest.json")]
    shutil.copytree(staged, scene.directory)
    assert len(scene.answers()) == scene.n_rows
    return f"exit code 1; all {scene.n_rows} in the staged copy, and how to upload them is told"


def two_runs(scene: Scene) -> str:
    first = scene.start(slow_ms=150)
    scene.wait_for_part(first)
    seen: list[Ended] = [scene_run_beside(scene, *more) for more in ((), ("--resume",))]
    assert [one.code for one in seen] == [2, 2], seen
    assert "already holds a run" in seen[0].err
    assert f"is being written by process {first.pid} of " in seen[1].err, seen[1].err
    assert "starting NULL" not in seen[0].err + seen[1].err
    first.send_signal(signal.SIGTERM)
    ended = scene.ended(first)
    assert ended.code == 143
    rest = scene.resumed(scene.answers())
    return f"the second ends with exit code 2 and names the first; {rest}"


def scene_run_beside(scene: Scene, *more: str) -> Ended:
    process = scene.start("--show_progress", *more)
    out, err = process.communicate(timeout=60)
    return Ended(process.returncode, out, err)


def truncated(every: int) -> Callable[[Scene], str]:
    """A part cut off at every byte: told, missing, and measured again."""

    def happen(scene: Scene) -> str:
        scene.n_rows = 8
        assert scene.run().code == 0
        n = 0
        for folder in ("turns", "steps"):
            path = scene.directory / folder / "00000.parquet"
            whole = path.read_bytes()
            first = scene.random.randrange(every)
            for size in range(first, len(whole), every):
                path.write_bytes(whole[:size])
                run = store.load(scene.directory)
                assert run.damage, f"{folder} cut at byte {size} went unnoticed"
                assert len(run.columns.conversation_ids) == 0
                assert not store.committed(scene.directory)
                n += 1
            path.write_bytes(whole)
        assert len(scene.answers()) == scene.n_rows
        path.write_bytes(whole[: scene.random.randrange(len(whole))])
        told(scene, "cannot be read")
        seen = scene.resumed({})
        path.write_bytes(whole)  # found again: what is there twice counts once
        columns = store.load(scene.directory).columns
        assert len(columns.conversation_ids) == scene.n_rows
        assert int(columns.n_tokens.sum()) == scene.n_rows * LENGTH
        return f"{n} lengths: each told as damage; {seen}, also with the part restored"

    return happen


def newer_manifest(scene: Scene) -> str:
    assert scene.run().code == 0
    path = scene.directory / "manifest.json"
    newer = {**json.loads(path.read_text()), "format": store.FORMAT + 1}
    text = json.dumps(newer)
    path.write_text(text)
    for words in (("report", str(scene.directory)),
                  ("run", "--save_dir", str(scene.directory), "--resume")):  # fmt: skip
        ended = scene.command(*words)
        assert ended.code == 2
        assert f"has format {store.FORMAT + 1}" in ended.err
    assert path.read_text() == text
    return "exit code 2, the formats are named, nothing is changed"


def cut_manifest(scene: Scene) -> str:
    assert scene.run().code == 0
    path = scene.directory / "manifest.json"
    whole = path.read_bytes()
    path.write_bytes(whole[: scene.random.randrange(len(whole) - 2)])
    for words in (("report", str(scene.directory)),
                  ("run", "--save_dir", str(scene.directory), "--resume")):  # fmt: skip
        ended = scene.command(*words)
        assert ended.code == 2, ended
        assert "restore it from a copy" in ended.err or "format number" in ended.err
    assert pq.read_metadata(scene.directory / "turns" / "00000.parquet").num_rows
    return "exit code 2, one sentence"


KEPT = "what was committed is kept; exit code {}; --resume completes it, nothing twice"

FAULTS: Sequence[Fault] = (
    Fault("SIGTERM", KEPT.format(143), signalled(signal.SIGTERM, 143)),
    Fault("SIGINT (Ctrl-C)", KEPT.format(130), signalled(signal.SIGINT, 130)),
    Fault("SIGUSR1 (a batch system's notice)", KEPT.format(138), signalled(signal.SIGUSR1, 138)),
    Fault("SIGINT twice", "ends at once; " + KEPT.format(130), interrupted_twice),
    Fault("SIGKILL at any moment, 3 times a run", KEPT.format(137), killed, n_full=70),
    Fault("SIGKILL at any file operation", KEPT.format(137), killed_at_operation, n_full=60,
          n_quick=2),
    Fault("SIGTERM while the engine hangs", KEPT.format(143), stopped_while_hanging),
    Fault("SIGKILL while an engine's process hangs", "that process is ended, too",
          killed_with_children),
    Fault("suspended for longer than --stall_timeout", "the run goes on", suspended),
    Fault("engine dies at request n", KEPT.format(1),
          fails("dies-at-request:?", 1, "its GPU fell off the bus"), n_full=20),
    Fault("engine raises something unforeseen", KEPT.format(1),
          fails("crash:?", 1, "ZeroDivisionError")),
    Fault("segmentation fault in the engine's code", KEPT.format(139) + "; the stack in the log",
          fails("segfault:?", -signal.SIGSEGV, "the run was killed", err="Segmentation fault",
                is_abrupt=True)),
    Fault("engine hangs in this process", KEPT.format(1) + "; its stack is stored",
          hung("hangs:?", "time.sleep")),
    Fault("engine hangs and lets no thread run", KEPT.format(134) + "; its stack is stored",
          fails("hangs-and-holds:?", -signal.SIGABRT, "the run was killed", err="hang_and_hold",
                is_abrupt=True)),
    Fault("engine's process hangs", KEPT.format(1) + "; its stack is in the report",
          stalled_twice_reported),
    Fault("engine never ends an answer", KEPT.format(1),
          fails("endless", 1, "does not end its answers", stall="600")),
    Fault("answers in reverse order", "the same run", harmless("reversed")),
    Fault("answers late, beside later ones", "the same run", harmless("late")),
    Fault("answers with unknown ids", "counted apart, in no number",
          harmless("unknown", "for requests that were not in flight")),
    Fault("last answers twice", "counted apart, in no number",
          harmless("last-twice", "for requests that were not in flight")),
    Fault("every answer twice", "an error in the report",
          wrong("twice", "at the same instant")),
    Fault("more tokens than asked for", "an error in the report",
          wrong("too-many", f"are longer than {LENGTH} tokens")),
    Fault("times run backwards", "an error in the report, no step time", backwards),
    Fault("times of another clock", "an error in the report",
          wrong("future", "outside of their session")),
    Fault("NaN for a time", "that conversation failed, by name", no_numbers("nan")),
    Fault("no time", "that conversation failed, by name", no_numbers("no-time")),
    Fault("a word for a time", "that conversation failed, by name", no_numbers("text-time")),
    Fault("a time beyond 64 bits", "that conversation failed, by name", no_numbers("huge-time")),
    Fault("words for token IDs", "that conversation failed, by name", no_numbers("text-token")),
    Fault("a negative count", "that conversation failed, by name", no_numbers("negative")),
    Fault("an end for no known reason", "that conversation failed, by name",
          no_numbers("odd-reason")),
    Fault("the wall clock jumps by years", "the same run", harmless("clock")),
    Fault("the disk fills up", KEPT.format(2), full_disk),
    Fault("the disk is full from the start", "exit code 2 before the engine's start",
          full_from_the_start),
    Fault("files cannot grow (RLIMIT_FSIZE)", KEPT.format(2), limited_file_size),
    Fault("--save_dir where nothing can be written", "exit code 2 before the engine's start",
          unwritable("/proc/nowhere/run")),
    Fault("--save_dir below a file", "exit code 2 before the engine's start",
          unwritable("{folder}/file/run")),
    Fault("the directory becomes read-only", KEPT.format(2), read_only_mount),
    Fault("the directory is moved away", KEPT.format(2), moved_away(False)),
    Fault("the mount vanishes, an empty folder stays", KEPT.format(2), moved_away(True)),
    Fault("what is behind a URL vanishes", "exit code 1; all is in the staged copy", remote_gone,
          n_full=2, n_quick=0),
    Fault("two runs into one directory", "the second is refused, and told by whom", two_runs),
    Fault("a part cut off at any byte", "told as damage; --resume measures it again",
          truncated(1), n_full=1, n_quick=0),
    Fault("a part cut off at every 97th byte", "told as damage; --resume measures it again",
          truncated(97), n_full=0),
    Fault("a manifest of a newer format", "exit code 2, nothing is changed", newer_manifest,
          n_full=1),
    Fault("a manifest that was cut off", "exit code 2, nothing is changed", cut_manifest),
)  # fmt: skip
