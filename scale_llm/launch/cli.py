"""The command line: scale-llm [flags] experiment=NAME run_dir=DIR key=value ...

Nothing here imports torch: --help and --check answer at once, and bad input is refused before any rank starts.
"""

import sys
from dataclasses import dataclass

from scale_llm.config.errors import UsageError, UserError, numbered
from scale_llm.launch.environment import quiet_imports

FLAGS = {
    "-h": "help", "--help": "help",
    "--version": "version",
    "--check": "check",
    "--dry-run": "dry_run",
    "--prepare": "prepare",
    "-m": "multirun", "--multirun": "multirun",
}  # fmt: skip


@dataclass(kw_only=True, slots=True)
class Command:
    """The command line in parts: flags by name, and the words for Hydra."""

    flags: frozenset[str]
    words: list[str]
    show_config: bool = False


def parse_command(arguments: list[str]) -> Command:
    """Split flags from overrides; raises UsageError for flags that do not exist."""
    flags, words, problems, show_config = set(), [], [], False
    rest = iter(arguments)
    for word in rest:
        if word in FLAGS:
            flags.add(FLAGS[word])
        elif word in ("-c", "--cfg"):
            show_config = True
            if (what := next(rest, None)) != "job":
                problems.append(f"{word} {what or ''}: only '{word} job' is known: it prints the configuration")
        elif word.startswith("-"):
            problems.append(f"{word}: unknown flag; one of {', '.join([*FLAGS, '--cfg job'])}")
        else:
            words.append(word)
    if problems:
        raise UsageError(problems)
    return Command(flags=frozenset(flags), words=words, show_config=show_config)


def run_command(arguments: list[str]) -> int:
    """Do what the words ask for; returns the exit status."""
    if arguments[:1] == ["status"]:
        from scale_llm.launch.status import status

        return status(arguments[1:])
    if arguments[:1] == ["score"] and not {"-h", "--help"} & set(arguments):
        from scale_llm.launch.score import score_words

        arguments = score_words(arguments[1:])
    command = parse_command(arguments)
    if "help" in command.flags:
        from scale_llm.launch.help_text import help_text

        print(help_text())
        return 0
    if "version" in command.flags:
        from scale_llm import __version__

        print(f"scale-llm {__version__}")
        return 0
    from scale_llm.launch import runs

    asked = (flag for flag in ("check", "prepare", "dry_run") if flag in command.flags)
    do = "config" if command.show_config else next(asked, "run")
    if "multirun" in command.flags:
        from scale_llm.launch.sweep import sweep

        return sweep(command.words, do)
    return runs.ACTIONS[do](runs.compose_run(command.words))


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the script scale-llm."""
    quiet_imports()
    try:
        status = run_command(sys.argv[1:] if arguments is None else arguments)
    except UserError as error:
        print(numbered(error.problems), file=sys.stderr)
        status = error.exit_status
    except KeyboardInterrupt:
        print("stopped before any rank started", file=sys.stderr)
        status = 130
    except BrokenPipeError:
        sys.stderr.close()  # the reader (head, less) has gone: nothing left to say to it
        status = 1
    sys.exit(status)


if __name__ == "__main__":
    main()
