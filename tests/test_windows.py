"""What Windows lacks is not asked for, and every name that we give a file is allowed there.

A process from which the POSIX-only modules and functions are taken away imports all of flux_core and runs its commands.
"""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from flux_core.hooks.sites import block_names
from flux_core.methods.importance import Prompt, Study, Task
from flux_core.request.generation import GenerationRequest
from flux_core.variants import VARIANTS

ROOT = Path(__file__).parents[1]
MODULES = (
    "crypt",
    "curses",
    "fcntl",
    "grp",
    "nis",
    "pty",
    "pwd",
    "readline",
    "resource",
    "spwd",
    "syslog",
    "termios",
    "tty",
)
OS = (
    *(
        "chown",
        "fchdir",
        "fchmod",
        "fchown",
        "fork",
        "forkpty",
        "getegid",
        "geteuid",
        "getgid",
        "getloadavg",
        "getpgid",
    ),
    *("getuid", "killpg", "lchown", "mkfifo", "mknod", "posix_fadvise", "posix_fallocate", "pread", "preadv", "pwrite"),
    *("pwritev", "sched_getaffinity", "sendfile", "setsid", "sync", "sysconf", "uname", "wait4", "WNOHANG"),
)
SIGNALS = ("SIGALRM", "SIGCHLD", "SIGHUP", "SIGKILL", "SIGPIPE", "SIGQUIT", "SIGUSR1", "SIGUSR2", "pthread_sigmask")
WINDOWS = f"""
import importlib, json, os, signal, sys
from pathlib import Path
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import einops, filelock, numpy, PIL.Image, pydantic, safetensors.torch, shutil, torch, torch.distributed, tqdm, dotenv
for name in {MODULES!r}: sys.modules[name] = None
sys.modules["triton"] = None
for name in {OS!r}: vars(os).pop(name, None)
for name in {SIGNALS!r}: vars(signal).pop(name, None)

names = set()
def note(event, args):
    if event in ("open", "os.mkdir", "os.rename", "os.link"):
        names.update(Path(x).name for x in args[:2] if isinstance(x, str) and "/output/" in x or x == "output")
sys.addaudithook(note)

for path in sorted(Path({str(ROOT)!r}, "flux_core").rglob("*.py")):
    module = ".".join(path.relative_to({str(ROOT)!r}).with_suffix("").parts).removesuffix(".__init__")
    if module not in sys.argv[1].split(",") and not module.endswith("__main__"):
        importlib.import_module(module)

import flux_core.pipeline
from flux_core.main import main
from tiny import tiny_pipeline
flux_core.pipeline.load_pipeline = tiny_pipeline
torch.set_num_threads(1)
for words in json.loads(sys.argv[2]):
    assert main(words) == 0, words
print(json.dumps(sorted(names)))
"""
SIZE = ["--width=32", "--height=32", "--force"]


def needs_triton(path):
    """Whether a module imports Triton when it is imported itself."""
    imports = (node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.Import))
    return any(alias.name.split(".")[0] == "triton" for node in imports for alias in node.names)


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """Every name that the commands open, make or rename under their output folder."""
    folder = tmp_path_factory.mktemp("windows")
    out = ["--output-dir", str(folder / "output")]
    kernels = [path for path in (ROOT / "flux_core").rglob("*.py") if needs_triton(path)]
    assert {path.parent.name for path in kernels} == {"kernels"}
    without = ",".join(".".join(path.relative_to(ROOT).with_suffix("").parts) for path in kernels)
    axes = ["--seeds=1,2", "--steps=1,2", "--guidance=1.25,1e-7", "--cross", "--save-latents=every"]
    (folder / "words.txt").write_text("a red apple\na: green? <apple>\n", encoding="utf-8")
    commands = [
        ["--prompt", "a red apple", "--seed", "1", "2", "--steps=2", *SIZE, *out],
        ["--prompt", "a red apple", "--seed=1", "--steps=2", "--stepwise-dir", str(folder / "output"), *SIZE, *out],
        ["explore", "--prompts", str(folder / "words.txt"), *axes, *SIZE, *out],
        [
            "edit",
            "--source",
            "a red apple",
            "--edit",
            "a car",
            "--layers=layer.0",
            "--seed=1",
            "--steps=2",
            *SIZE,
            *out,
        ],
    ]
    command = [sys.executable, "-c", WINDOWS, without, json.dumps(commands)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def allowed(name):
    """Whether Windows takes a file name (learn.microsoft.com: Naming Files, Paths, and Namespaces)."""
    device = re.fullmatch(r"(CON|PRN|AUX|NUL|COM[0-9]|LPT[0-9])(\..*)?", name, re.IGNORECASE)
    return not device and not re.search(r'[<>:"/\\|?*\x00-\x1f]|[. ]$', name) and 0 < len(name) <= 255


def test_the_rules_are_those_of_windows():
    assert all(map(allowed, ["seed_1.png", "guidance_3.5.png", ".claims", "1e+09.png", "console.txt"]))
    assert not any(
        map(allowed, ["12:30.png", "a?.png", "con", "NUL.txt", "lpt1.png", "a.", "a ", "", "a\n", "x" * 256])
    )


def test_without_posix_everything_runs_and_has_names_that_windows_takes(names):
    kinds = {re.sub(r"\d+", "#", name) for name in names}
    assert {"session.json", ".session.lock", ".claims", "#.lock", "metadata.csv", "flux-mini_seed#.png"} <= kinds
    assert any(name.startswith(".flux_core.") for name in names) and len(names) > 60
    assert [name for name in names if not allowed(name)] == []


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_a_study_has_names_that_windows_takes(variant, tmp_path):
    request = GenerationRequest(prompt="a pig", name=variant, seed=0, num_steps=1)
    study = Study(tmp_path, [Prompt(prompt="a: pig?", seed=7)], 1, request)
    paths = [study.path(Task(0, 7, block)) for block in block_names(VARIANTS[variant].params)]
    assert all(allowed(part) for path in paths for part in path.relative_to(tmp_path).parts)


def text_call(node):
    """What a call lacks that reads or writes text: its encoding, and what ends its lines."""
    match node:
        case ast.Call(func=ast.Attribute(attr="write_text")):
            wanted = {"encoding", "newline"}
        case ast.Call(func=ast.Attribute(attr="read_text")):
            wanted = {"encoding"}
        case ast.Call(func=ast.Attribute(attr="open") | ast.Name(id="open")):
            modes = (arg.value for arg in node.args if isinstance(arg, ast.Constant))
            wanted = {"encoding", "newline"} if any(re.fullmatch("[rwax][+t]*", str(mode)) for mode in modes) else set()
        case _:
            return set()
    return wanted - {keyword.arg for keyword in node.keywords}


def test_text_files_name_their_encoding_and_end_of_line():
    """Windows' own are the code page and CRLF. What is written goes through bytes, or names both."""
    for path in sorted((ROOT / "flux_core").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not text_call(node), f"{path}:{node.lineno}"
