"""An artifact folder: checked inputs, fresh or stale, atomic writes, and one record of what made it.

A stage opens the folders that it reads as `Input`, says what it will make as `Output`, makes what is left and
calls `finish`. The record, manifest.json, holds the code, the parameters and the inputs that decide every
byte (the identity), then each file's sha256; no time, host, path or command.
"""

import argparse
import ast
import contextlib
import csv
import datetime
import errno
import hashlib
import importlib.metadata
import io
import json
import os
import re
import shlex
import shutil
import sys
import time
from pathlib import Path


def on_exception(kind, error, trace):
    """Ctrl-C is one message and exit code 130, also while the libraries below load."""
    if not issubclass(kind, KeyboardInterrupt):
        return sys.__excepthook__(kind, error, trace)
    sys.stderr.write("\ninterrupted: what is finished stays; the same command goes on from there\n")
    os._exit(130)


sys.excepthook = on_exception

import filelock
import numpy as np
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent
PACKAGES = "torch diffusers transformers numpy scikit-learn opencv-python-headless av peft".split()
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
# Only torchrun sets the run id; RANK and WORLD_SIZE are left in the environment by other launchers too.
LAUNCHED = os.environ if "TORCHELASTIC_RUN_ID" in os.environ else {}
RANK, WORLD = int(LAUNCHED.get("RANK", 0)), int(LAUNCHED.get("WORLD_SIZE", 1))


class ContractError(Exception):
    """What the user can mend, as one message: what is wrong, what was expected and found, what to type."""

    def __init__(self, what, expected=None, found=None, fix=None):
        lines = (("expected:", expected), ("found:   ", found), ("to fix:  ", fix))
        super().__init__(what + "".join(f"\n  {name} {text}" for name, text in lines if text is not None))


class Missing(ContractError):
    """Data, a model or an earlier stage's folder that is not there yet; --dry-run plans without it."""


def arguments(script, doc, datasets, ipc=True):
    """The parser of a script: its docstring is its help; these options mean the same everywhere.

    script: the script's __file__. datasets: media.find_data_set. ipc: whether it takes one; "?" if it may.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(datasets=datasets, script=Path(script).resolve())
    parser.add_argument("dataset", help="demo, hmdb51, miniucf, ucf101, or one's own (docs/data.md)")
    if ipc:
        nargs = "?" if ipc == "?" else None
        parser.add_argument("ipc", type=int, nargs=nargs, help="instances (videos) per class, distilled")
    add = parser.add_argument_group("options of every stage").add_argument
    add("--work-dir", type=Path, default=Path("work"), help="artifacts go to WORK_DIR/<data set> (work)")
    add("--data-root", type=Path, default=Path("data"), help="folder that holds the data sets (data)")
    add("--model", help="text-to-video model of 01 and 03, a folder or hub name (the data set's own)")
    add("--seed", type=int, default=0, help="seed of everything that is drawn (0)")
    add("--classes", help="only these classes, separated by commas (all)")
    add("--limit", type=int, help="at most this many items per class: to try an edit, with --name")
    add("--device", help="cpu, cuda, cuda:1 ... (a GPU where there is one)")
    add("--threads", type=int, help="CPU threads (the cores that this process may use)")
    add("--redo", action="store_true", help="make the files that were changed again, or all if none was")
    add("--keep", action="store_true", help="accept a stale folder as it is; its record says so")
    add("--dry-run", action="store_true", help="print what is fresh, stale or left, hours and disk, and stop")
    return parser


def parse(parser):
    """Parses the command line; misuse ends with exit code 2. args.classes becomes a list in ASCII order.

    Integers are at least 1, or 0 where that is the default.
    """
    args = parser.parse_args()
    for name, value in vars(args).items():
        if type(value) is int and value < (least := int(parser.get_default(name) != 0)):
            parser.error(f"{'' if name == 'ipc' else '--'}{name.replace('_', '-')}: must be at least {least}")
    args.number = re.sub(r"^(\d\d)_.*", r"\1", args.script.stem)  # 03; a tool's whole name
    for option in ("dataset", "name", "samples", "prototypes"):  # folders, always below the work folder
        value = getattr(args, option, None) or "none"
        if not re.fullmatch(r"\w[\w.+-]*", value) or ".old-" in value:
            parser.error(f"{'--' * (option != 'dataset')}{option}: {value!r} is not a plain folder name")
    args.spec = args.datasets(args)
    args.classes = sorted(set(args.classes.split(","))) if args.classes else args.spec["classes"]
    if unknown := sorted(set(args.classes) - set(args.spec["classes"])):
        parser.error(f"--classes: {args.dataset} has no class {unknown[0]!r}")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", args.device or "cpu"):
        parser.error(f"--device: {args.device!r} is not cpu, cuda or cuda:<number>")
    gpus, number = torch.cuda.device_count(), int((args.device or "").partition(":")[2] or 0)
    if args.device not in (None, "cpu") and number >= gpus:
        raise ContractError(f"--device {args.device}: there is no such device here", fix="--device cpu")
    if args.device != "cpu" and 0 < gpus <= int(LAUNCHED.get("LOCAL_RANK", 0)):
        raise ContractError("more processes than GPUs here", gpus, fix=f"--nproc-per-node {gpus}")
    torch.set_num_threads(args.threads or len(os.sched_getaffinity(0)))
    return args


def command(args, script, *options):
    """The command that runs `script` for the same data set and folders, as the user would type it."""
    words, without = ["python", script, args.dataset], re.match(r"01|demo|tools/(finetune|train)", script)
    words += [args.ipc] if getattr(args, "ipc", None) and not without else []  # these take no IPC
    usual = {"work-dir": Path("work"), "data-root": Path("data"), "model": None, "seed": 0}
    for name, default in usual.items():
        value = getattr(args, name.replace("-", "_"), default)
        words += [f"--{name}", value] if value != default else []
    return shlex.join(map(str, [*words, *options]))


def run(parse_args, main, estimate):
    """Runs a script. What the user can mend is one message and exit code 3.

    estimate(args): {first part of an output's folder: (item, items, seconds, bytes, machine)}, for --dry-run.
    """
    args = None
    try:
        args = parse_args()
        args.estimate = estimate(args)
        main(args)
    except (ContractError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in UNWRITABLE:
            raise
        if not (args and args.dry_run and isinstance(error, Missing)):
            print(f"error: {error}", file=sys.stderr)
            sys.exit(3)
        for cost in args.estimate.values():
            say(f"{args.number} {plan(cost)}; {str(error).splitlines()[0]}")
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def say(text):
    """Prints a line at once; of torchrun's processes only the first does."""
    if RANK == 0:
        print(text, flush=True)


def bar(*args, **options):
    """A tqdm bar; of torchrun's processes only the first has one."""
    return tqdm(*args, mininterval=1, disable=True if RANK else None, **options)


def plan(cost, share=1):
    """What --dry-run prints of an estimate of which `share` is left; run_all.sh adds up the h and GB."""
    item, items, seconds, size, machine = cost
    left = f"{round(items * share):,} of {items:,} {item} left"
    mark = "" if "measured" in machine else ", estimate"
    return f"{left}, {seconds * share / 3600:.3f} h on {machine}{mark}, {size * share / 1e9:.3f} GB"


def gather(value=None):
    """Waits for all of torchrun's processes; returns the value of each."""
    if WORLD > 1 and not torch.distributed.is_initialized():  # a stage may wait hours for its slowest process
        torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(days=7))
    values = [value] * WORLD
    if WORLD > 1:
        torch.distributed.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def atomic(path, size=0):
    """A handle to a temporary file that replaces `path` when the block ends without an error.

    size: the bytes to be written, if known. A disk that cannot be written is a ContractError.
    """
    path = Path(path)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "w+b") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except Exception as error:
        failed = error  # torch.save and PyAV raise an error of their own; the context of that is the write's
        while failed and getattr(failed, "errno", None) not in UNWRITABLE:
            failed = failed.__context__
        if failed is None:
            raise
        there = next(folder for folder in path.absolute().parents if folder.exists())
        needed, free = f"{size:,} bytes" if size else "room", f"{shutil.disk_usage(there).free:,} bytes free"
        fix = "make room; the same command then goes on"
        raise ContractError(f"{path} cannot be written: {failed.strerror}", needed, free, fix) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def save(path, value):
    """Writes bytes, or by its suffix an array (.npy), JSON, rows (.csv) or tensors (.pt), atomically."""
    suffix = Path(path).suffix
    with atomic(path, getattr(value, "nbytes", 0)) as handle:
        if isinstance(value, bytes):
            handle.write(value)
        elif suffix == ".npy":
            np.save(handle, np.ascontiguousarray(value), allow_pickle=False)
        elif suffix == ".json":
            handle.write((json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode())
        elif suffix == ".csv":
            text = io.StringIO()
            csv.writer(text, lineterminator="\n").writerows(value)
            handle.write(text.getvalue().encode())
        else:
            torch.save(value, handle)


def read(path, fix=None):
    """What `save` wrote: a .csv as dictionaries, an .npy memory-mapped, None for a .json that is not there.

    ContractError when it is damaged; fix: what to type then.
    """
    try:
        if (suffix := Path(path).suffix) == ".npy":
            return np.load(path, mmap_mode="r", allow_pickle=False)
        if suffix == ".pt":
            return torch.load(path, weights_only=True, map_location="cpu", mmap=True)
        if suffix == ".csv":
            with open(path, encoding="utf-8", newline="") as handle:
                return list(csv.DictReader(handle))
        return json.loads(Path(path).read_bytes()) if os.path.exists(path) else None
    except Exception as error:  # the libraries raise many kinds
        raise ContractError(f"{path} is damaged", f"{suffix[1:]} data", error, fix or f"rm {path}") from None


def digest(value):
    """sha256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sha256(path):
    """sha256 of a file."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def generator(seed, *names):
    """A CPU generator for one item: it depends on the seed and the item's names, on nothing else."""
    value = hashlib.sha256("/".join(map(str, (seed, *names))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(value[:8], "little") % 2**63)


def code_identity(script):
    """{"file: definition": its code, hashed if long} of a script and of what it reaches in modules beside it.

    By top-level definition, without comments and docstrings. Left out are the parser and the data sets, whose
    values are parameters, and what decides no byte: estimates and contract.py.
    """
    files = [script, *(file for folder in {ROOT, script.parent} for file in folder.glob("[a-z]*.py"))]
    code = {file.stem: {} for file in files if file.stem != "contract"}
    for file in (file for file in files if file.stem in code):
        for node in ast.parse(file.read_text("utf-8")).body:
            for part in ast.walk(node):
                body = getattr(part, "body", None)
                if isinstance(body, list) and ast.unparse(body[:1]).startswith(("'", '"')):
                    part.body = body[1:]
            stored = {
                n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
            }
            names = [node.name] if hasattr(node, "name") else stored or ["(top level)"]
            for name in [] if isinstance(node, (ast.Import, ast.ImportFrom)) else names:
                if name not in ("parse_args", "estimate", "DATASETS") and not name.startswith("SECONDS"):
                    code[file.stem][name] = code[file.stem].get(name, "") + ast.unparse(node)
    found, queue = {}, [(script.stem, name) for name in code[script.stem]]
    for module, name in queue:  # grows by what a definition names: module.name, or a name of its own module
        text = code[module][name]
        value = re.fullmatch(r"\w+ = (.{1,50})", text)  # of a short constant, to be shown
        found[f"{module}.py: {name}"] = value[1] if value else hashlib.sha256(text.encode()).hexdigest()[:16]
        words = {(module, word) for word in re.findall(r"\w+", text)} | {*re.findall(r"\b(\w+)\.(\w+)", text)}
        queue += [(m, w) for m, w in sorted(words) if w in code.get(m, ()) and (m, w) not in queue]
    return found


def differences(old, new):
    """How two identities differ, as strings. An input that only one of them has does not count."""
    found = [f"input {name} changed" for name, h in new["inputs"].items() if old["inputs"].get(name, h) != h]
    for part in ("parameters", "code"):
        for name in sorted({*old[part], *new[part]}):
            a, b = old[part].get(name), new[part].get(name)
            hashed = part == "code" and any(re.fullmatch("[0-9a-f]{16}", str(x)) for x in (a, b))
            found += [f"{name} changed" if hashed else f"{name} {a} -> {b}"] if a != b else []
    return found


def read_record(folder, fix):
    """manifest.json of a folder, None without one; refused when damaged or when it names a file outside."""
    record = read(folder / "manifest.json", fix)
    if record is not None:
        keys = {"complete", "outputs", "code", "parameters", "inputs", "kept"}
        good = isinstance(record, dict) and keys <= {*record} and isinstance(record["outputs"], dict)
        if not good or any(os.path.isabs(name) or ".." in Path(name).parts for name in record["outputs"]):
            raise ContractError(f"{folder / 'manifest.json'} is damaged", "the record of a folder", fix=fix)
    return record


class Input:
    """A complete folder of an earlier stage below work/<data set>; files are checked before they are read.

    fix: the command that makes the folder. Raises Missing when it is not there or not complete.
    """

    def __init__(self, args, folder, fix):
        self.folder, self.fix = args.work_dir / args.dataset / folder, fix
        self.record = read_record(self.folder, f"{fix} --redo")
        if not self.record or not self.record["complete"]:
            found = "an incomplete one" if self.record else "none"
            raise Missing(f"{self.folder / 'manifest.json'} is missing", "a complete folder", found, fix)
        self.outputs = self.record["outputs"]

    def check(self, names):
        """{name: sha256} of files that will be read; raises when one of them is missing or damaged."""
        names = list(names)
        if missing := [name for name in names if name not in self.outputs]:
            found = f"{len(names) - len(missing)} of them"
            raise Missing(f"{self.folder / missing[0]} is missing", f"{len(names)} files", found, self.fix)
        for name in names:
            path, expected = self.folder / name, self.outputs[name]["sha256"]
            found = sha256(path) if path.is_file() else "no such file"
            if found != expected:
                raise ContractError(f"{path} is damaged", f"sha256 {expected}", found, f"{self.fix} --redo")
        return {name: self.outputs[name]["sha256"] for name in names}

    def load(self, name, shape=None, dtype=None):
        """A file's content; ContractError for an array of another `shape` (None: any length) or `dtype`."""
        value, fix = read(self.folder / name, f"{self.fix} --redo"), f"{self.fix} --redo"
        if shape:
            found, expected = f"{value.dtype} {list(value.shape)}", f"{dtype} {list(shape)}"
            free = [b if a is None else a for a, b in zip(shape, value.shape, strict=False)]
            if len(shape) != value.ndim or found != f"{dtype} {free}":
                raise ContractError(f"{self.folder / name}: unexpected shape or dtype", expected, found, fix)
        return value


class Output:
    """A folder below work/<data set> that this run makes.

    parameters: {name: value} that decide bytes; device, dtype may be None, automatic. inputs: {name: hash}.
    wanted: the files to make. derived: those written anew whenever others are. shared: torchrun may share it.
    check: called before a stale folder is set aside, to refuse what could not be made instead of it.
    Afterwards `todo` is the set of files to make, empty when the folder is fresh and with --dry-run; `device`
    and `dtype` are those to use. A stale folder is renamed to <name>.old-<n>, never deleted.
    """

    def __init__(self, args, folder, parameters, inputs, wanted, derived=(), shared=False, check=None):
        self.args, self.folder, self.started = args, args.work_dir / args.dataset / folder, time.monotonic()
        self.cost, self.wanted, self.derived = args.estimate[Path(folder).parts[0]], wanted, derived
        if WORLD > 1 and not shared:
            raise ContractError(f"{args.script.name} runs in one process", fix="type it without torchrun")
        spec = {name: args.spec[name] for name in ("size", "resize", "side", "val") if name in args.spec}
        values = {**spec, **parameters, "dataset": args.dataset, "seed": args.seed}
        self.identity = {"parameters": values, "inputs": inputs, "code": code_identity(args.script)}
        self.identity = json.loads(json.dumps(self.identity))  # tuples become lists
        self.todo = self.record = None
        if RANK == 0:
            self.begin(check)
        if WORLD > 1:  # what the first process has decided
            self.todo, self.record = gather((self.todo, self.record))[0]
        kind = self.record["parameters"].get("device", "cpu")
        self.dtype = getattr(torch, self.record["parameters"].get("dtype", "float32"))
        self.device = torch.device(args.device if args.device and kind == "cuda" else kind)
        if kind == "cuda" and WORLD > 1:  # a GPU for each process
            self.device = torch.device("cuda", int(LAUNCHED["LOCAL_RANK"]))

    def begin(self, check):
        """Decides what is to be made, by one process; with --dry-run it only says so."""
        args, dry, values, reasons = self.args, self.args.dry_run, self.identity["parameters"], []
        if not dry:
            name = self.folder.relative_to(args.work_dir).as_posix().replace("/", "--")
            lock = args.work_dir / ".cache" / f"{name}.lock"
            lock.parent.mkdir(parents=True, exist_ok=True)
            self.lock = filelock.FileLock(lock)  # held until this process ends
            try:
                self.lock.acquire(timeout=0)
            except filelock.Timeout:
                raise ContractError(f"another run is at work in {self.folder}", fix="wait") from None
        try:
            old = read_record(self.folder, "the same command with --redo")
        except ContractError:
            if not args.redo:
                raise
            old, reasons = None, ["manifest.json is damaged"]
        chosen = [name for name in ("device", "dtype") if name in values and values[name] is None]
        for name in chosen:  # automatic: what was made elsewhere stays fresh
            made = old["parameters"].get(name) if old else None
            values[name] = made or automatic(name, args.device)
        if "device" in values:
            values["device"] = values["device"].split(":")[0]
        if old:
            reasons = differences(old, self.identity)
        elif any(path.is_file() and path.name[:5] != ".tmp-" for path in self.folder.rglob("*")):
            reasons = reasons or ["files without manifest.json"]
        text = "; ".join(reasons[:5]) + f" and {len(reasons) - 5} more" * (len(reasons) > 5)
        notes, kept = [], old["kept"] if old else []
        if reasons and old and args.keep:
            notes, kept = [f"kept although {text}"], [*kept, reasons]
        elif reasons:
            numbered = (self.folder.with_name(f"{self.folder.name}.old-{n}") for n in range(1, 10**6))
            aside, old, notes = next(path for path in numbered if not path.exists()), None, [f"stale: {text}"]
            values |= {name: automatic(name, args.device) for name in chosen}
            if not dry:
                check() if check else None
                os.rename(self.folder, aside)
                notes += [f"the old folder is kept as {aside.name}"]

        outputs, inputs = (old["outputs"], old["inputs"]) if old else ({}, {})
        there = [name for name in self.wanted if old and (self.folder / name).is_file()]
        known = [name for name in there if name in outputs]
        changed = [name for name in known if sha256(self.folder / name) != outputs[name]["sha256"]]
        if changed and not (args.redo or dry):
            what = f"{self.folder / changed[0]} has changed since it was made ({len(changed)} in all)"
            expected, found = f"sha256 {outputs[changed[0]]['sha256']}", sha256(self.folder / changed[0])
            raise ContractError(what, expected, found, "the same command with --redo")
        redo = set(changed or self.wanted) if args.redo else set()
        todo = {*self.wanted} - {*there} | redo
        self.record = {**(old or {}), **self.identity, "kept": kept}
        self.record["inputs"] = {**inputs, **self.identity["inputs"]}
        fresh = old and old["complete"] and not todo and outputs.keys() >= {*self.wanted}
        no_gpu = not torch.cuda.is_available()
        if no_gpu and values.get("device") == "cuda" and not (fresh or dry):
            fix = "--device cpu, which makes all of it again"
            raise ContractError(f"{self.folder} was begun on a GPU", found="none here", fix=fix)
        if not fresh and no_gpu and "device" in values and not args.device and args.dataset != "demo":
            notes += ["there is no GPU: on the CPU"]  # where a real data set takes days
        if fresh or dry:
            notes += [f"fresh: {self.folder}" if fresh else plan(self.cost, len(todo) / len(self.wanted))]
        if notes:
            print(f"{args.number} {'; '.join(notes)}", flush=True)
        self.todo = set() if dry or fresh else todo | {*self.derived, "manifest.json"}
        if dry or (fresh and kept == old["kept"]):
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        killed = [path for path in self.folder.rglob(".tmp-*") if re.match(r"\.tmp-\d+-", path.name)]
        for path in [*killed, *(self.folder / name for name in redo)]:
            path.unlink(missing_ok=True)
        self.record["outputs"] = {name: entry for name, entry in outputs.items() if name not in self.todo}
        self.record["complete"] = bool(fresh)
        save(self.folder / "manifest.json", self.record)
        self.log(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {shlex.join(sys.argv)}", shown=False)

    def mine(self, items, files):
        """The items that are left for this process. files(item): the names of an item's files."""
        return [item for item in items[RANK::WORLD] if self.todo & {*files(item)}]

    def log(self, text, shown=True):
        """Adds a line to log.txt, and prints it."""
        if shown and RANK == 0:
            print(text, flush=True)
        with open(self.folder / "log.txt", "a", encoding="utf-8") as log:
            log.write(text + "\n")

    def finish(self):
        """Writes the record, last of all, with bytes and sha256 of every output."""
        gather() if WORLD > 1 else None
        if RANK > 0 or not self.todo:
            return
        for name in self.wanted:
            path = self.folder / name
            if not path.is_file():
                raise ContractError(f"{path} was not made", fix="the same command")
            self.record["outputs"][name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        versions = {"python": sys.version.split()[0]}
        for package in PACKAGES:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                versions[package] = importlib.metadata.version(package)
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        self.record |= {"complete": True, "versions": versions, "device": device}
        save(self.folder / "manifest.json", self.record)
        outputs, seconds = self.record["outputs"].values(), time.monotonic() - self.started
        size = sum(entry["bytes"] for entry in outputs) / 1e6
        done = f"{len(outputs)} files, {size:.1f} MB in {self.folder}, {seconds:.0f} s"
        self.log(f"{self.args.number} done: {done}")
        self.lock.release()


def automatic(name, device):
    """The device, a GPU where there is one, or the dtype: bfloat16 where the device computes in it."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "device":
        return device
    if device != "cpu":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    cpu = Path("/proc/cpuinfo")
    return "bfloat16" if cpu.exists() and re.search(r"avx512_bf16|amx_bf16", cpu.read_text()) else "float32"
