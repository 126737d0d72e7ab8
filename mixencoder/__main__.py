"""``python -m mixencoder``: the command line; without its extra, a message that says how to get it."""

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
    # bad usage is told by typer, outside of any command
    escape_unencodable()
    app(prog_name="mixencoder")


if __name__ == "__main__":
    main()
