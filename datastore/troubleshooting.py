"""Every code of an error: what it means, how it comes about, and what to do.

The code stands at the beginning of the line that a command ends with, `error[config]: ...`. `datastore explain CODE` prints what
stands here, and `docs/troubleshooting.md` is made of it, so both are there without a network and neither can be out of date.
A test holds the codes against those that the package has.
"""

import difflib
from dataclasses import dataclass

from datastore.errors import ConfigError

__all__ = ["DOCS_URL", "EXPLANATIONS", "Explanation", "explain"]

DOCS_URL = "https://github.com/llm-datastore/llm-datastore/blob/main/docs"
"""Where the pages are, for whoever has only what was installed."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """One code."""

    code: str
    error: str
    """The class in Python; empty where only the command line has it."""

    status: int
    """The exit code of the command."""

    means: str
    cases: tuple[tuple[str, str], ...]
    """How it comes about, and what to do then; the most frequent first."""

    pages: tuple[str, ...]
    """Where more is said, below docs/."""


EXPLANATIONS = (
    Explanation(
        code="config",
        error="ConfigError",
        status=2,
        means="A setting, an argument or a URL is wrong; the message names it.",
        cases=(
            ("A key is not known.", "The message names the key that is most like it. All keys: `docs/settings.md`."),
            ("A value is out of range, or of another type.", "The message says what it may be."),
            (
                "The dataset holds the other kind: records where tokens are needed, or the other way round.",
                "`datastore show URL` says which it is. Text becomes tokens by `--tokenizer`, in a new dataset.",
            ),
            (
                "The dataset was made with another tokenizer.",
                "Leave `--tokenizer` out, and its own is used; or make another dataset with `datastore retokenize`.",
            ),
            (
                "The batch cannot be dealt out: it is smaller than the number of ranks, or the dataset than one sample.",
                "Change `data.global_batch`, `data.seq_len` or the number of processes.",
            ),
            ("A URL names a version where only the newest can be written.", "Leave the @ and what follows it away."),
        ),
        pages=("settings.md", "commands.md"),
    ),
    Explanation(
        code="missing",
        error="MissingError",
        status=1,
        means="Nothing is stored under that URL, version, tag, step or file name.",
        cases=(
            ("The URL is misspelt, or leads to the folder above or below.", "`datastore show URL` says what is there."),
            ("The version has expired, or never was.", "`datastore log URL` lists the versions that can be read."),
            (
                "The run has no checkpoint yet.",
                "`datastore checkpoint ls RUN`; the first is saved after `checkpoint.every` steps.",
            ),
            ("The bucket or the folder above does not exist.", "Make it first: only what lies below the URL is made."),
            ("An id that is to be deleted is that of no document.", "`datastore ls URL --documents` lists ids."),
        ),
        pages=("howto/versions.md", "checkpoints.md"),
    ),
    Explanation(
        code="conflict",
        error="ConflictError",
        status=1,
        means="Somebody else was first, or is at work. What they wrote is whole, and nothing of yours is half there.",
        cases=(
            ("Two writers changed the same shards.", "Run the same command again: it starts from what is there now."),
            (
                "Another process writes to this run.",
                "If it is gone, wait until its lock runs out, or take over with `--take-over`; two would spoil the run.",
            ),
            ("A source file changed while it was read.", "Run the ingest again once nobody writes the file."),
            (
                "The target is not empty, or holds something else.",
                "Name another place. Nothing is overwritten by accident.",
            ),
            ("Some shares of an ingest are not done.", "Run those again; then give the command with `--commit`."),
            (
                "The step is there already, or lies before the last one.",
                "`datastore fork RUN` goes on from an older step.",
            ),
        ),
        pages=("howto/versions.md", "howto/engines.md", "trainer.md"),
    ),
    Explanation(
        code="corrupt",
        error="CorruptError",
        status=1,
        means="Bytes are not what was written, or a file of somebody else's is damaged. Nothing wrong was handed on.",
        cases=(
            (
                "A file of a dataset: a disk has lost bits, or something has written into it.",
                "`datastore verify URL` lists what is damaged. `datastore repair URL` mends it, or a backup.",
            ),
            (
                "A checkpoint.",
                "`datastore checkpoint verify RUN` says which steps are whole. `datastore resume` takes the newest of them by itself.",
            ),
            (
                "A source of an ingest: an archive or a table that ends in the middle.",
                "Fetch it again, or leave it out by `--exclude`.",
            ),
            (
                "It comes again, on other files.",
                "Suspect the memory or the disk: `datastore verify` twice must say the same.",
            ),
        ),
        pages=("bad-input.md", "howto/redundancy.md", "checkpoints.md"),
    ),
    Explanation(
        code="format",
        error="FormatError",
        status=1,
        means="What lies there is no dataset or run of ours, or a newer version of this package wrote it.",
        cases=(
            ("The folder holds something else.", "`datastore ingest FOLDER --to URL` makes a dataset of it."),
            ("It uses features that this version does not know.", "Upgrade: `pip install -U llm-datastore`."),
            ("One root of a dataset holds another dataset.", "Look at what is mounted where."),
            ("An archive that is none.", "Fetch it again."),
        ),
        pages=("stability.md", "format.md", "howto/migrate.md"),
    ),
    Explanation(
        code="resume",
        error="ResumeError",
        status=1,
        means="The saved state is of another dataset, model, order or set of hooks than the one it is to go on with.",
        cases=(
            (
                "The settings of the run were changed.",
                "The message names the keys. What may change: `--set` of `datastore resume`. For anything else start a new run, or `datastore fork`.",
            ),
            (
                "Another dataset lies at the URL, or a version without the shards of the run.",
                "Put the dataset back. What was only added since does no harm: a run stays with its version.",
            ),
            ("A hook, a teacher or a tokenizer is another one.", "Put back the one that the message names."),
            (
                "The loader has another seed, another length of samples or another order.",
                "Give it the values that the message names.",
            ),
        ),
        pages=("trainer.md", "order.md"),
    ),
    Explanation(
        code="rejected",
        error="RejectedError",
        status=3,
        means="More of the input was bad than the limit allows, so nothing was committed. The good part need not be done again.",
        cases=(
            (
                "Records are no JSON, have no text, or are no UTF-8.",
                "The message counts the reasons; `datastore rejects URL` shows each one with its place. Repair the source, and run it again.",
            ),
            ("The key is another one.", "Name it: `--text-key`, `--id-key`, or `--template` for several."),
            (
                "That many bad records are all right.",
                "Run it again with a higher `--max-reject-ratio`; it goes on from there.",
            ),
            ("A transform of yours failed on a row.", "The message names the row and what was raised."),
        ),
        pages=("howto/ingest.md", "bad-input.md"),
    ),
    Explanation(
        code="dependency",
        error="DependencyError",
        status=1,
        means="An optional package is needed for this, and is not installed.",
        cases=(
            ("An extra is missing.", "The message has the line for pip. `datastore doctor` lists all extras."),
            ("It was installed, but into another Python.", "`datastore doctor` names the Python that runs."),
        ),
        pages=("howto/install.md",),
    ),
    Explanation(
        code="timeout",
        error="WaitError",
        status=1,
        means="Another process did not do its part in time. The message names it.",
        cases=(
            (
                "A rank died, or was killed for want of memory.",
                "Look at the log of the rank that is named: the others only waited. Then `datastore resume`.",
            ),
            (
                "The ranks do not find each other.",
                "All must get the same address, port and number of ranks, and the port must be open between the machines.",
            ),
            (
                "Saving or loading takes longer than it may.",
                "Raise `train.timeout_s`; look at the storage with `datastore doctor --url URL`.",
            ),
        ),
        pages=("howto/distributed.md", "howto/faults.md"),
    ),
    Explanation(
        code="storage",
        error="StorageError",
        status=1,
        means="The disk, the network or the server failed. Nothing that is half written can be seen.",
        cases=(
            (
                "The disk is full, or a quota is used up.",
                "Make room; then give the same command again. `datastore vacuum` finds what no version needs.",
            ),
            ("No permission.", "The message names the place. For object stores see which keys are used: `docs/s3.md`."),
            (
                "Keys are missing, wrong or have expired.",
                "Nothing is read but what the library below reads, such as AWS_PROFILE.",
            ),
            (
                "The server does not answer, or says it is busy.",
                "It was asked several times already. Try later: what was done stays.",
            ),
            (
                "A root of the dataset is not there.",
                "Mount it; if the disk is lost, `datastore repair URL` fills a new one.",
            ),
        ),
        pages=("s3.md", "howto/object-stores.md", "howto/redundancy.md"),
    ),
    Explanation(
        code="error",
        error="DatastoreError",
        status=1,
        means="Something went wrong for which none of the other codes says what to do next; the message does.",
        cases=(
            (
                "A loss, a gradient or a weight is not finite.",
                "The run has stopped before it saved anything of it. Lower the learning rate, or let a policy skip such steps.",
            ),
            (
                "A worker of an ingest died.",
                "Run the same command again. If memory was short: fewer `--workers`, or a smaller `task_bytes`.",
            ),
            (
                "A fast encoder gave other tokens than the reference.",
                "The ingest has stopped. Take `--set encoder=tokenizers` into a new dataset, and report the text.",
            ),
        ),
        pages=("howto/faults.md", "howto/engines.md"),
    ),
    Explanation(
        code="usage",
        error="",
        status=2,
        means="The command line does not say what to do: a command, an option or an argument is missing, or is not known.",
        cases=(("Anything of that kind.", "`datastore COMMAND --help` ends with an example that runs."),),
        pages=("commands.md",),
    ),
    Explanation(
        code="memory",
        error="",
        status=1,
        means="The machine has no memory left for this.",
        cases=(
            (
                "An ingest.",
                "Fewer `--workers`, or a smaller `task_bytes`. A worker holds one batch of documents and one shard.",
            ),
            (
                "Training.",
                "Smaller batches by `train.micro_batch`, a smaller model, or parameters in parts on several ranks.",
            ),
        ),
        pages=("howto/ingest.md", "parallelism.md"),
    ),
    Explanation(
        code="system",
        error="",
        status=1,
        means="The operating system refused something that is none of the storage's business.",
        cases=(
            ("Too many open files.", "Raise the limit of the shell: `ulimit -n 4096`."),
            ("A file that was named on the command line cannot be read or written.", "The message has its name."),
        ),
        pages=("commands.md",),
    ),
    Explanation(
        code="bug",
        error="",
        status=1,
        means="A mistake in datastore itself, or in code of yours that it calls. What was committed before is whole.",
        cases=(
            (
                "Code of yours: a transform, a hook, an objective.",
                "`--debug` shows the lines; the last ones are yours.",
            ),
            ("Ours.", "Report what `--debug` shows, with the output of `datastore doctor`."),
        ),
        pages=("CONTRIBUTING.md",),
    ),
)
"""All codes, in the order of the page."""


def explain(code: str) -> Explanation:
    """Return what there is to say about `code`, which may be written as it is printed: `error[config]:`.

    Raises:
        ConfigError: no error has that code.
    """
    asked = code.strip().removeprefix("error[").rstrip(":").removesuffix("]")
    known = {each.code: each for each in EXPLANATIONS}
    if asked not in known:
        near = difflib.get_close_matches(asked, known, 1)
        hint = f"Did you mean {near[0]}?" if near else f"There are: {', '.join(known)}."
        raise ConfigError("no error has this code", code=asked, hint=hint)
    return known[asked]
