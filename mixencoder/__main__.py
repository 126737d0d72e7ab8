"""``python -m mixencoder``: the command line, or a message that says how to install what it needs."""

import sys


def main() -> None:
    """Run the command line."""
    try:
        from mixencoder.cli import app
        from mixencoder.cli.messages import escape_unencodable
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("rich", "typer"):
            raise
        sys.exit(f"the command line needs the extra: pip install 'mixencoder[cli]' ({error})")
    except KeyboardInterrupt:
        sys.exit(130)
    # typer prints usage errors before any command runs
    escape_unencodable()
    app(prog_name="mixencoder")


if __name__ == "__main__":
    main()
