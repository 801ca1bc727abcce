"""The command line: `kvswitch demo`, `evaluate`, `simulate`, and what else comes with packages."""

from __future__ import annotations

import sys
from importlib import import_module

from kvswitch.errors import KVSwitchError

__all__ = ["main"]

# Subcommand -> (module with a click command of that name, extra that brings what it needs).
_COMMANDS = {
    "calibrate": ("kvswitch_cuda.command", "cuda,report"),
    "demo": ("kvswitch_demo.demo", "demo"),
    "evaluate": ("kvswitch.sim.commands", "report"),
    "simulate": ("kvswitch.sim.commands", "report"),
}


def main() -> None:
    """Run the subcommand named in the arguments; named errors end it with one line, not a trace."""
    try:
        import click
    except ModuleNotFoundError:
        sys.exit("the command line needs click: pip install 'kvswitch[report]'")

    class Commands(click.Group):
        """Imports a subcommand's module only when it is asked for."""

        def list_commands(self, ctx: click.Context) -> list[str]:
            return sorted(_COMMANDS)

        def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
            if cmd_name not in _COMMANDS:
                return None
            module, extra = _COMMANDS[cmd_name]
            try:
                command: click.Command = getattr(import_module(module), cmd_name)
            except ModuleNotFoundError as error:
                raise click.ClickException(
                    f"'{cmd_name}' needs {error.name}: pip install 'kvswitch[{extra}]'"
                ) from error
            return command

    @click.group(cls=Commands)
    @click.version_option(package_name="kvswitch")
    def kvswitch() -> None:
        """Cheap context switches for LLM serving."""

    try:
        kvswitch(prog_name="kvswitch")
    except KVSwitchError as error:
        sys.exit(f"kvswitch: {error}")
