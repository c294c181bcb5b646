"""The contract of an artifact folder: identity, manifest, fresh or stale, writes, seeds, errors, the shared options.

Nothing here computes anything of the paper. A stage calls `identity` and `begin`, makes the files that are missing, and
calls `finish`; it opens its input folders with `read_folder`. So a folder that is complete and unchanged is never made
twice, one made by other code, options or inputs is kept aside, and a killed run goes on where it stopped.

Several processes (torchrun) share the files of a folder through `shared`. They agree by locks on the bytes of one file
in WORK_DIR/.cache: a lock ends with its process, so nobody waits for one that died, and nothing times out.
"""

import argparse
import ast
import contextlib
import copy
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import sys
import time
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
from tqdm import tqdm


class ContractError(Exception):
    """A file or folder that is not as agreed; shown to the user as one message, exit code 3."""


class Missing(ContractError):
    """Data or a model that is not on this machine; --dry-run plans without it."""


COMMON = Path(__file__).resolve().with_name("common.py")
SCHEMA = 1  # of manifest.json
MOST_REASONS = 5  # that are said of a stale folder
EARLIER = ".manifest.json"  # the manifest of a folder that is being extended or mended
CONTRACT_VERSION = 1  # raise it when a change of this file changes the bytes of an artifact
POLL = 0.2  # seconds between two looks at what another process makes
AUTOMATIC = ("device", "threads", "dtype")  # options that take the recorded value when they were not typed


def generator(seed, *names):
    """A CPU generator for one item: it depends on the seed and the item's names, on nothing else."""
    value = hashlib.sha256("/".join(str(n) for n in (seed, *names)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(value[:8], "little") % 2**63)


def arguments(doc, datasets, ipc=True):
    """The parser of a stage: its docstring is its help; these options mean the same in every stage.

    datasets: {name: {"classes": ..., "resize": ..., "side": ...}}, common.DATASETS.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=sorted(datasets), help="data set")
    if ipc:
        parser.add_argument("ipc", type=positive, help="videos per class of the distilled data set")
    parser.add_argument("--work-dir", type=Path, default=Path("work"), help="artifacts go to WORK_DIR/<data set> (work)")
    parser.add_argument("--data-root", type=Path, default=Path("data"), help="folder that holds the data sets (data)")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything that is drawn (0)")
    parser.add_argument("--classes", help="only these classes, separated by commas (all)")
    parser.add_argument("--limit", type=positive, help="at most this many items of each class: try an edit, with --name")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (a GPU where there is one)")
    parser.add_argument("--threads", type=positive, help="CPU threads (the cores that this process may use)")
    parser.add_argument("--redo", action="store_true", help="make changed files, or all if none is changed, again")
    parser.add_argument("--accept-code", action="store_true", help="keep a folder whose code alone changed")
    parser.add_argument("--dry-run", action="store_true", help="say what is fresh, stale or to do, and stop")
    parser.add_argument("--after", metavar="NN", help=argparse.SUPPRESS)  # with --dry-run: stage NN will run before
    parser.set_defaults(datasets=datasets)
    return parser


def positive(text):
    """An integer of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def parse(parser):
    """Parses the command line; `args.classes` becomes a list in ASCII order, usage errors exit with 2."""
    args = parser.parse_args()
    args.spec = args.datasets[args.dataset]
    known = args.spec["classes"]
    wanted = args.classes.split(",") if args.classes else known
    if unknown := [c for c in wanted if c not in known]:
        parser.error(f"--classes: {args.dataset} has no class {unknown[0]!r}")
    args.classes = sorted(set(wanted))
    try:
        kind = torch.device(args.device or "cpu").type
    except RuntimeError:
        kind = None
    if kind not in ("cpu", "cuda"):
        parser.error(f"--device: {args.device!r} is not cpu, cuda or cuda:<number>")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ContractError(f"--device {args.device}: there is no such device here\n  type --device cpu")
    return args


def work_folder(args, *parts):
    """WORK_DIR/<data set>/<parts>."""
    return Path(args.work_dir, args.dataset, *parts)


def command(script, args, *extra):
    """The command line that runs `script` for the same data set and folders, to be shown to the user."""
    words = [python(), script, args.dataset]
    if not script.startswith(("01", "tools")) and getattr(args, "ipc", None):
        words.append(str(args.ipc))
    for option, default in (("work_dir", Path("work")), ("data_root", Path("data")), ("seed", 0)):
        if (value := getattr(args, option)) != default:
            words += ["--" + option.replace("_", "-"), str(value)]
    return shlex.join([*words, *map(str, extra)])


def own_name():
    """The running script as the user types it: tools/finetune_unet.py, 03_guided_sample.py."""
    path = Path(sys.argv[0]).resolve()
    return path.relative_to(COMMON.parent).as_posix() if path.is_relative_to(COMMON.parent) else path.name


def python():
    """The interpreter as the user types it: below the working directory (.venv) by its path."""
    path = Path(sys.executable)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else "python"


def say(*words):
    """Prints a line at once, on the screen (of several processes the first) and, once a folder is open, in its log.txt."""
    if rank() == 0:
        print(*words, flush=True)
    if open_log.path:
        with open(open_log.path, "a", encoding="utf-8") as log:
            print(*words, file=log)


def open_log(folder, identity):
    """Starts a run's part of log.txt: command, versions, parameters and the source that runs."""
    open_log.path = folder / "log.txt"
    lines = [
        f"{time.strftime('%Y-%m-%d %H:%M:%S')} {shlex.join([own_name(), *sys.argv[1:]])}",
        f"python {platform.python_version()}",
    ]
    lines += [f"{k} = {v}" for k, v in sorted(identity["parameters"].items())]
    for path in (Path(sys.argv[0]), COMMON):
        lines += ["=" * 20 + " " + path.name, path.read_text("utf-8"), "=" * 20]
    with open(open_log.path, "a", encoding="utf-8") as log:
        log.write("\n".join(lines) + "\n")


open_log.path = None


def rank():
    """The number of this process among those that torchrun started, 0 without it."""
    return int(os.environ.get("RANK", 0))


def bar(*args, **options):
    """A tqdm bar; of several processes, only the first has one."""
    return tqdm(*args, mininterval=1, **options, **({"disable": True} if rank() else {}))


def lock(what, path, kind=fcntl.LOCK_EX, wait=True):
    """Takes a lock that ends with this process, or gives it back (LOCK_UN); False when another process has it."""
    byte = int(digest([what, os.path.realpath(path)])[:15], 16)
    try:
        fcntl.lockf(lock.handle, kind if wait else kind | fcntl.LOCK_NB, 1, byte)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        if processes() > 1 or error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
            raise ContractError(f"{lock.handle.name} cannot be locked: {error}\n  take another --work-dir") from None
    return True  # also on a file system without locks: one process has nobody to agree with


lock.handle = None


@contextlib.contextmanager
def alone(folder):
    """A block that one process at a time runs for a folder."""
    lock("folder", folder)
    try:
        yield
    finally:
        lock("folder", folder, fcntl.LOCK_UN)


def shared(items, files):
    """Yields the items of which a file is missing, each to one process at a time; whoever is free takes the next.

    files: function of an item that returns its paths. An item that another process is making is waited for; when that
    process ends without it, it is made here. So at the end every item is there, or was tried here.
    """
    while items:
        others = []
        for item in items:
            paths = files(item)
            if all(path.is_file() for path in paths):
                continue
            if not lock("item", paths[0], wait=False):
                others.append(item)
                continue
            try:
                if not all(path.is_file() for path in paths):
                    yield item
            finally:
                lock("item", paths[0], fcntl.LOCK_UN)
        items = others
        if items:
            time.sleep(POLL)


@contextlib.contextmanager
def atomic(path):
    """A handle to a temporary file in the same folder that replaces `path` when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        with open(temporary, "w+b") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def checkpoint(path):
    """Around the reading of a checkpoint, a file of torch.save: one that is damaged is an error that says so."""
    try:
        yield
    except (OSError, EOFError, KeyError, ValueError, RuntimeError, UnpicklingError) as error:
        raise ContractError(f"{path} is damaged\n  found: {error}\n  delete it: rm {path}") from None


def write_json(path, value):
    """JSON with sorted keys, atomically."""
    with atomic(path) as handle:
        handle.write((json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode())


def save_array(path, array):
    """An .npy file in C order, atomically."""
    with atomic(path) as handle:
        np.save(handle, np.ascontiguousarray(array), allow_pickle=False)


def load_array(path, shape, dtype, mend):
    """An .npy file, memory-mapped, checked against `shape` (None: any length) and `dtype`."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        found = f"{array.dtype} {list(array.shape)}"
        fits = array.dtype == np.dtype(dtype) and len(array.shape) == len(shape)
        fits = fits and all(want in (None, have) for want, have in zip(shape, array.shape, strict=True))
    except (OSError, ValueError, EOFError) as error:
        found, fits = str(error), False
    if not fits:
        wanted = ", ".join("n" if side is None else str(side) for side in shape)
        raise ContractError(f"{path} is no such array\n  expected: {dtype} [{wanted}]\n  found:    {found}\n  run: {mend}")
    return array


def read_json(path):
    """The JSON of a file, None when there is no such file; ContractError when it is damaged."""
    try:
        return json.loads(Path(path).read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ContractError(f"{path} is damaged\n  expected: JSON\n  found: {error}") from None


def digest(value):
    """sha256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class Hashes:
    """sha256 of files, remembered by size and modification time in WORK_DIR/.cache."""

    def __init__(self, work_dir):
        self.path, self.changed = Path(work_dir, ".cache", "sha256.json"), False
        try:
            self.known = dict(json.loads(self.path.read_bytes()))
        except (OSError, ValueError, TypeError):  # only a cache: it is made again
            self.known = {}

    def __call__(self, path):
        state = os.stat(path)
        key, stamp = os.path.abspath(path), [state.st_size, state.st_mtime_ns]
        if self.known.get(key, [None])[0] != stamp:
            with open(path, "rb") as handle:
                self.known[key] = [stamp, hashlib.file_digest(handle, "sha256").hexdigest()]
            self.changed = True
        return self.known[key][1]

    def save(self):
        if self.changed:
            with atomic(self.path) as handle:
                handle.write(json.dumps(self.known).encode())
            self.changed = False


class Meaning(ast.NodeTransformer):
    """Takes out of code what changes no value: docstrings, help and error texts, what is only printed."""

    def visit_Expr(self, node):
        if isinstance(node.value, ast.Constant):
            return None
        if isinstance(node.value, ast.Call):
            function = node.value.func
            if getattr(function, "attr", getattr(function, "id", "")) in ("print", "say", "error"):
                node.value.args, node.value.keywords = [], []
        return self.generic_visit(node)

    def visit_Raise(self, node):
        if isinstance(node.exc, ast.Call):
            node.exc.args, node.exc.keywords = [], []
        return self.generic_visit(node)

    def visit_Call(self, node):
        node.keywords = [k for k in node.keywords if k.arg != "help"]
        return self.generic_visit(node)


def definitions(path):
    """{name: (node, meaning)} of a file's top level; the meaning of a short constant is its text, else a hash."""
    found = {}
    for node in ast.parse(Path(path).read_text("utf-8")).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names = node.name
        elif isinstance(node, ast.Assign):
            names = ", ".join(ast.unparse(target) for target in node.targets)
        else:
            names = "(top level)"
        if names.startswith("SECONDS"):  # only estimates for --dry-run
            continue
        meaning = Meaning().visit(copy.deepcopy(node))
        text = ast.unparse(meaning) if meaning else ""
        value = ast.unparse(node.value) if isinstance(node, ast.Assign) else ""
        short = value if 0 < len(value) <= 60 and not re.search(r"[({]", value) else digest(text)[:16]
        if names in found:
            short = digest([found[names][1], short])[:16]
        found[names] = (meaning or ast.Pass(), short)
    return found


def code_identity(script, apart):
    """{file: {definition: meaning}} of a stage and of the definitions of common.py that it reaches.

    By `ast.unparse` without comments and docstrings, so neither of them changes it. Data sets enter an identity by their
    own entry, and this file by CONTRACT_VERSION. apart: definitions of the stage that only show something.
    """
    own, shared = definitions(script), definitions(COMMON)
    own = {name: value for name, value in own.items() if name not in apart}
    reached, queue = {}, []
    for node, _ in own.values():
        for part in ast.walk(node):
            if isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name) and part.value.id == "common":
                queue.append(part.attr)
    while queue:
        name = queue.pop()
        if name in shared and not name.endswith(("DATASETS", "_CLASSES")) and name not in reached:
            node, reached[name] = shared[name]
            queue += [part.id for part in ast.walk(node) if isinstance(part, ast.Name)]
    return {Path(script).name: {n: meaning for n, (_, meaning) in own.items()}, "common.py": reached}


def identity(script, args, parameters, inputs, classes, apart=()):
    """What decides every byte of an artifact folder.

    parameters: {name: value} that can change a value; device, threads and dtype may be None: automatic. inputs:
    {name: content hash}. classes: {class: content hash or dict of them} for inputs of one class, an extent: a folder may
    grow by classes. The data set's own sizes and the seed are added.
    """
    spec = {k: v for k, v in args.spec.items() if k in ("resize", "side")}
    found = {"device": args.device or ("cuda" if torch.cuda.is_available() else "cpu")}
    found["threads"] = args.threads or len(os.sched_getaffinity(0))
    found["dtype"] = "bfloat16" if has_bfloat16(found["device"]) else "float32"
    unset = [name for name in AUTOMATIC if name in parameters and parameters[name] is None]
    values = {**parameters, **{name: found[name] for name in unset}, "seed": args.seed}
    return {
        "stage": Path(script).stem,
        "contract": CONTRACT_VERSION,
        "code": code_identity(script, apart),
        "data set": {"name": args.dataset, **json.loads(json.dumps(spec))},
        "parameters": json.loads(json.dumps(values)),
        "inputs": inputs,
        "classes": classes,
        "automatic": unset,
    }


def has_bfloat16(device):
    """Whether the device computes in bfloat16 natively, and so about twice as fast as in float32."""
    if device != "cpu":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpu = Path("/proc/cpuinfo")
    return cpu.exists() and re.search(r"\b(avx512_bf16|amx_bf16)\b", cpu.read_text()) is not None


def differences(old, new, made=None):
    """[(kind, text)] of what makes folder `old` another than `new`; kind is "code" or "value".

    made: whether a class has outputs; the input of one that has none may have changed.
    """
    found = []
    for file in sorted({*old["code"], *new["code"]}):
        before, after = old["code"].get(file, {}), new["code"].get(file, {})
        for name in sorted({*before, *after}):
            a, b = before.get(name, "nothing"), after.get(name, "nothing")
            if a != b:
                hashed = any(re.fullmatch("[0-9a-f]{16}", x) for x in (a, b))
                found.append(("code", f"{name} in {file} changed" if hashed else f"{name} {a} -> {b}"))
    for part in ("parameters", "data set", "inputs"):
        for name in sorted({*old[part], *new[part]}):
            a, b = old[part].get(name), new[part].get(name)
            if a != b and name not in new["automatic"]:
                shown = f"{name} changed" if part == "inputs" else f"{name} {a} -> {b}"
                found.append(("value", shown))
    changed = [c for c in old["classes"] if c in new["classes"] and old["classes"][c] != new["classes"][c]]
    changed = [c for c in changed if made is None or made(c)]
    if changed:
        more = f" and {len(changed) - 1} more classes" if len(changed) > 1 else ""
        found.append(("value", f"input of {changed[0]}{more} changed"))
    if old["contract"] != new["contract"]:
        found.append(("value", f"contract {old['contract']} -> {new['contract']}"))
    return found


def begin(folder, identity, wanted, args, cost, derived=()):
    """Decides what has to be made in `folder`. Returns (files to make or None when fresh, identity to use).

    wanted: relative paths of the outputs asked for. cost: (name of an item, items, seconds and bytes of all of them,
    machine), shown by --dry-run. derived: outputs that are written anew at every extension. Another identity's folder is
    renamed to <name>.old-<8 hex>, or taken back from there.
    Raises ContractError when a file has changed since its manifest was written (--redo mends).

    Of several processes the first one here does this. A later one joins it, and neither renames nor removes anything.
    """
    if args.dry_run:
        return decide(folder, identity, wanted, args, cost, derived)
    if processes() > 1 and int(os.environ.get("LOCAL_WORLD_SIZE", processes())) != processes():
        raise ContractError("the processes must be on one machine\n  type torchrun --nproc-per-node N")
    if processes() > 1 and args.redo:
        raise ContractError("--redo is for one process\n  type it without torchrun, or remove the folder and share the work")
    if lock.handle is None:
        path = Path(args.work_dir, ".cache", "locks")
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.handle = open(path, "a+b")
    with alone(folder):
        joins = not lock("at work", folder, wait=False)
        lock("at work", folder, fcntl.LOCK_SH)
        if joins:
            old = recorded_identity(folder)
            reasons = differences(old, identity) if old else [("value", "the folder is not begun yet")]
            if args.redo or reasons:
                what = "; ".join(text for _, text in reasons) or "--redo"
                raise ContractError(f"another process is at work in {folder}, and this one differs: {what}\n  wait for it")
        return decide(folder, identity, wanted, args, cost, derived)


def processes():
    """How many processes torchrun started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def take_gpu(device):
    """Gives each of the processes that torchrun started a GPU of its own: what "cuda" means from here on."""
    local, there = int(os.environ.get("LOCAL_RANK", rank())), torch.cuda.device_count()
    if device != "cuda" or local >= there:
        raise ContractError(
            f"{processes()} processes take a GPU each\n  expected: --device cuda, and as many GPUs\n"
            f"  found:    --device {device}, and {there}"
        )
    torch.cuda.set_device(local)


def decide(folder, identity, wanted, args, cost, derived):
    """What `begin` does, for one process at a time."""
    number = identity["stage"].split("_")[0]
    place, old, notes = settle(folder, identity, wanted, args)
    if old:  # the folder grows by classes; what was automatic stays what it was
        there = {part for path in place.rglob("*") for part in (path.stem, path.parent.name)}
        identity["classes"] = {**{c: h for c, h in old["classes"].items() if c in there}, **identity["classes"]}
        identity["parameters"].update({name: old["parameters"][name] for name in identity["automatic"]})
        identity.setdefault("accepted code", old.get("accepted code", []))
    identity.setdefault("accepted code", [])
    del identity["automatic"]

    device = identity["parameters"].get("device", "cpu")
    manifest = read_json(place / "manifest.json") if place else None
    changed = changed_files(place, manifest, derived, args) if place else []
    if changed and not (args.redo or args.dry_run):
        name, expected, found = changed[0]
        raise ContractError(
            f"{folder / name} has changed since it was made ({len(changed)} changed in all)\n"
            f"  expected: sha256 {expected}\n  found:    sha256 {found}\n  to make it again: {again()}"
        )
    redo = ({name for name, *_ in changed} or set(wanted)) if args.redo else set()
    missing = [name for name in wanted if name in redo or place is None or not (place / name).is_file()]
    complete = manifest and not missing and not redo and {*wanted} <= {*manifest["outputs"]}
    complete = complete and manifest["identity"] == identity
    if args.dry_run:
        what, items, seconds, size, machine = cost
        share = len(missing) / max(1, len(wanted))
        done = f"{round(items * (1 - share)):,} of {items:,} {what}"
        rest = f"; about {seconds * share / 3600:.2g} h on {machine}, {size * share / 1e9:.2g} GB to write"
        print(f"{number} {'; '.join([*notes, f'fresh: {folder}' if complete else done + rest])}")
        return None, identity
    if complete:
        (folder / EARLIER).unlink(missing_ok=True)
        say(f"{number} fresh: {folder}")
        return None, identity
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ContractError(f"{folder} was begun on {device}, and there is no such device here\n  type --device cpu")
    if device.startswith("cuda") and processes() > 1:
        take_gpu(device)

    folder.mkdir(parents=True, exist_ok=True)
    remove_temporaries(folder.rglob(".tmp-*"))
    remove_temporaries(work_folder(args).glob(".tmp-*"))
    for name in redo:
        (folder / name).unlink(missing_ok=True)
    if manifest:  # not complete any more; what it lists is remembered
        os.replace(folder / "manifest.json", folder / EARLIER)
    write_json(folder / "identity.json", {**identity, "sha256": digest(identity)})
    open_log(folder, identity)
    if "threads" in identity["parameters"]:
        torch.set_num_threads(identity["parameters"]["threads"])
    begin.started = time.monotonic()
    return missing, identity


def settle(folder, identity, wanted, args):
    """Puts a stale folder aside and takes one of this identity back. Returns (folder or None, its identity, notes).

    With --dry-run nothing is moved: the folder returned is the one that would be used.
    """
    number, notes = identity["stage"].split("_")[0], []

    def note(text):
        notes.append(text)
        if not args.dry_run:
            say(f"{number} {text}")

    def put_aside(what):
        aside, count = None, 0
        while aside is None or aside.exists():
            aside = folder.with_name(f"{folder.name}.old-{digest([what, count] if count else what)[:8]}")
            count += 1
        if not args.dry_run:
            os.rename(folder, aside)
            say(f"{number} the folder is kept as {aside.name}")

    def made(label):
        names = [name for name in wanted if label in (Path(name).stem, Path(name).parent.name)]
        return any((folder / name).is_file() for name in names)

    try:
        old = recorded_identity(folder)
    except ContractError:
        if not args.redo:
            raise
        put_aside([path.read_bytes().hex() for path in sorted(folder.glob("*.json"))])
        old = None
    if old:
        reasons = differences(old, identity, made)
        if not reasons:
            return folder, old, notes
        shown = [text for kind, text in sorted(reasons, key=lambda reason: reason[0] == "code")]  # values first
        more = f"; and {len(shown) - MOST_REASONS} more" if len(shown) > MOST_REASONS else ""
        texts = "; ".join(shown[:MOST_REASONS]) + more
        if args.accept_code and all(kind == "code" for kind, _ in reasons):
            note(f"accepted: {texts}")
            identity["accepted code"] = [*old.get("accepted code", []), digest(old["code"])[:8]]
            return folder, old, notes
        note(f"stale: {texts}")
        put_aside(old)
    for kept in sorted(folder.parent.iterdir()) if folder.parent.is_dir() else []:
        if kept.name.startswith(folder.name + ".old-"):
            with contextlib.suppress(ContractError):  # a damaged one stays aside
                old = recorded_identity(kept)
                if old and not differences(old, identity):
                    note(f"taken back from {kept.name}")
                    if args.dry_run:
                        return kept, old, notes
                    if folder.exists():  # begun and killed before its identity was written
                        remove_temporaries(folder.glob(".tmp-*"))
                        folder.rmdir()
                    os.rename(kept, folder)
                    return folder, old, notes
    return None, None, notes


def recorded_identity(folder):
    """The identity of a folder, None when there is none; ContractError when it or the manifest was changed."""
    if not (folder / "identity.json").exists() and not (folder / "manifest.json").exists():
        return None
    try:
        found = read_json(folder / "identity.json") or {}
        body = {k: v for k, v in found.items() if k != "sha256"}
        same = found.get("sha256") == digest(body)
    except (ContractError, AttributeError):
        same = False
    if (folder / "manifest.json").exists():
        same = checked_manifest(folder / "manifest.json", again())["identity"] == body if same else False
    elif (folder / EARLIER).exists():
        checked_manifest(folder / EARLIER, again())
    if not same:
        raise ContractError(
            f"{folder / 'identity.json'} has changed since it was written\n  expected: what it was written as\n"
            f"  found:    something else\n  to make it again: {again()}"
        )
    return body


def checked_manifest(path, mend):
    """A manifest; ContractError when it was changed since it was written."""
    try:
        manifest = read_json(path)
        body = {k: v for k, v in manifest.items() if k != "sha256"}
        expected, found = manifest.get("sha256"), digest(body)
    except (ContractError, AttributeError):
        expected, found = "JSON", "no JSON object"
    if expected != found:
        raise ContractError(
            f"{path} has changed since it was written\n  expected: sha256 {expected}\n"
            f"  found:    sha256 {found}\n  to make it again: {mend}"
        )
    return manifest


def changed_files(folder, manifest, derived, args):
    """[(name, expected sha256, found sha256)] of the outputs that have changed since the manifest was written.

    A folder that was being extended has the manifest of before, in which the derived outputs may be older.
    """
    hashes, changed = Hashes(args.work_dir), []
    earlier = manifest or read_json(folder / EARLIER)
    for name, entry in earlier["outputs"].items() if earlier else ():
        if (folder / name).is_file() and (manifest or name not in derived):
            found = hashes(folder / name)
            if found != entry["sha256"]:
                changed.append((name, entry["sha256"], found))
    hashes.save()
    return changed


def again(*extra):
    """This run's own command with more options, --redo if none are given."""
    words = [word for word in sys.argv[1:] if word not in ("--dry-run", "--redo")]
    return shlex.join([python(), own_name(), *words, *map(str, extra or ["--redo"])])


def remove_temporaries(paths):
    """Removes what a killed run left behind; files of a run of this script that is alive stay."""
    for path in paths:
        running = Path("/proc", path.name.split("-")[1], "cmdline")
        alive = running.exists() and Path(sys.argv[0]).name.encode() in running.read_bytes()
        if not alive or running.parent.name == str(os.getpid()):
            path.unlink(missing_ok=True)


def listed(folder, wanted):
    """The outputs that the manifest will list: what is asked for, and what it listed before, as far as it is there."""
    return [name for name in sorted({*known(folder), *wanted}) if (folder / name).is_file()]


def known(folder):
    """The outputs of the last manifest: of before this run, or that another process has just written."""
    return (read_json(folder / EARLIER) or read_json(folder / "manifest.json") or {"outputs": {}})["outputs"]


def finish(folder, identity, wanted, args, packages, kinds=None):
    """Writes the manifest, the last file: every output with shape, dtype, bytes and sha256. Then timing.json.

    kinds: {path: (shape, dtype)} of the outputs that are no .npy. packages: libraries whose versions are recorded.
    Of several processes the first one that has found everything complete writes it.
    """
    with alone(folder):
        remove_temporaries(folder.rglob(".tmp-*"))  # of a process that died meanwhile
        manifest = read_json(folder / "manifest.json")
        if not manifest or not {*wanted} <= {*manifest["outputs"]}:
            manifest = write_manifest(folder, identity, wanted, args, packages, kinds)
    total, seconds = sum(entry["bytes"] for entry in manifest["outputs"].values()), time.monotonic() - begin.started
    number = identity["stage"].split("_")[0]
    say(f"{number} done: {len(manifest['outputs'])} files, {total / 1e6:.1f} MB in {folder}, {seconds:.0f} s")


def write_manifest(folder, identity, wanted, args, packages, kinds):
    """Returns the manifest that it writes (see `finish`)."""
    earlier, hashes, outputs = known(folder), Hashes(args.work_dir), {}
    for name in listed(folder, wanted):
        if name.endswith(".npy"):
            array = np.load(folder / name, mmap_mode="r", allow_pickle=False)
            shape, dtype = list(array.shape), str(array.dtype)
        elif name in (kinds or {}):
            shape, dtype = kinds[name]
        else:
            shape, dtype = earlier[name]["shape"], earlier[name]["dtype"]
        size = (folder / name).stat().st_size
        outputs[name] = dict(shape=list(shape), dtype=dtype, bytes=size, sha256=hashes(folder / name))
    versions = {p: importlib.metadata.version(p) for p in ("torch", "numpy", *packages)}
    versions["python"] = platform.python_version()
    device = identity["parameters"].get("device", "cpu")
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"
    manifest = dict(schema=SCHEMA, identity=identity, versions=versions, device=name, outputs=outputs)
    manifest["sha256"] = digest(manifest)
    seconds = time.monotonic() - begin.started
    try:
        runs = list(read_json(folder / "timing.json")["runs"])
    except (ContractError, TypeError, KeyError):  # not there yet, or edited
        runs = []
    write_json(folder / "timing.json", {"runs": [*runs, {"seconds": round(seconds, 2)}]})
    write_json(folder / "manifest.json", manifest)
    (folder / EARLIER).unlink(missing_ok=True)
    hashes.save()
    return manifest


def folder_hash(folder, args):
    """Content hash of a folder that has no manifest, such as a model's part."""
    hashes = Hashes(args.work_dir)
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    value = digest({path.relative_to(folder).as_posix(): hashes(path) for path in files})
    hashes.save()
    return value


def read_folder(folder, args, mend):
    """The manifest of a complete, undamaged input folder; ContractError names the command that mends it.

    mend: the command that makes it; that of the run that did make it, from its log, is preferred.
    """
    mend = made_by(folder, args, mend)
    if not (folder / "manifest.json").exists():
        raise ContractError(
            f"{folder / 'manifest.json'} is missing\n  expected: a complete folder\n  found:    "
            f"{'an incomplete one' if folder.exists() else 'none'}\n  to make it: {mend}"
        )
    mend += " --redo"
    manifest = checked_manifest(folder / "manifest.json", mend)
    hashes = Hashes(args.work_dir)
    for name, entry in manifest["outputs"].items():
        path = folder / name
        found = hashes(path) if path.is_file() else "no such file"
        if found != entry["sha256"]:
            raise ContractError(
                f"{path} is damaged\n  expected: sha256 {entry['sha256']}, {entry['bytes']} bytes\n"
                f"  found:    {found}\n  to make it again: {mend}"
            )
    hashes.save()
    return manifest


def made_by(folder, args, mend, *extra):
    """The command of the last run that made a folder, from its log, with this run's paths; `mend` where there is none.

    extra: options, each with its value, that replace the command's own.
    """
    try:
        text = (folder / "log.txt").read_text("utf-8")
    except OSError:
        return mend
    runs = re.findall(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (.+)$", text, re.M)
    if not runs:
        return mend
    words = [word for word in shlex.split(runs[-1]) if word != "--redo"]
    extra = ["--work-dir", str(args.work_dir), "--data-root", str(args.data_root), *map(str, extra)]
    for option, value in zip(extra[::2], extra[1::2], strict=True):
        at = [i for i, word in enumerate(words) if word.split("=")[0] == option]
        for i in reversed(at):
            del words[i : i + (1 if "=" in words[i] else 2)]
        if at or [option, value] not in (["--work-dir", "work"], ["--data-root", "data"]):
            words += [option, value]
    return f"{python()} {shlex.join(words)}"


def need(manifest, names, folder, mend):
    """ContractError when a complete input folder lacks files that this run needs: it was made for less."""
    missing = [name for name in names if name not in manifest["outputs"]]
    if missing:
        raise ContractError(
            f"{folder / missing[0]} is missing\n  expected: {len(names)} files\n  found:    {len(names) - len(missing)}\n"
            f"  to make the rest: {mend}"
        )


def content(manifest, names):
    """Content hash of the files of an input folder that are read: their names and bytes, not how they were made."""
    return digest({name: manifest["outputs"][name]["sha256"] for name in names})


def plan_after(args, number, cost):
    """--dry-run of a stage whose input is not there yet."""
    what, items, seconds, size, machine = cost
    reason = f"after {args.after}" if args.after else "its input is not there yet"
    print(f"{number} {reason}: 0 of {items:,} {what}; about {seconds / 3600:.2g} h on {machine}, {size / 1e9:.2g} GB to write")


def run(main):
    """Runs a stage's main: a broken contract is one message and exit code 3, no traceback."""
    try:
        main()
    except ContractError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(3)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        if lock.handle:
            lock.handle.close()  # gives back every lock
            lock.handle = None
