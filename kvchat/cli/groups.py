"""The list of commands in `kvchat --help`: in groups, by what they are for."""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup

GROUPS = {
    "Talk": ("chat", "ask", "attach"),
    "Sessions": ("ls", "show", "search", "stats", "episodes", "title", "tag", "rename", "fork", "rm"),
    "Files": ("export", "import", "archive", "vacuum", "verify", "encrypt", "decrypt"),
    "Settings": ("set", "config", "models", "doctor"),
    "Measure and learn": ("bench", "eval", "fit", "tune"),
}


class Sections(TyperGroup):
    """A group whose commands are listed under headings."""

    def list_commands(self, context: Any) -> list[str]:
        """All commands, those of GROUPS first."""
        known = [name for names in GROUPS.values() for name in names]
        return sorted(self.commands, key=lambda name: known.index(name) if name in known else len(known))

    def format_commands(self, context: Any, formatter: Any) -> None:
        """Write a table for each group, and one for what is in none."""
        listed = {name for names in GROUPS.values() for name in names}
        rest = tuple(name for name in self.list_commands(context) if name not in listed)
        for heading, names in {**GROUPS, "More": rest}.items():
            commands = [(name, self.commands[name]) for name in names if name in self.commands]
            width = formatter.width - 6 - max((len(name) for name in self.commands), default=0)
            rows = [(name, command.get_short_help_str(width)) for name, command in commands if not command.hidden]
            if rows:
                with formatter.section(heading):
                    formatter.write_dl(rows, col_spacing=2)
