"""The themes of kvchat's own; Textual's are there too."""

from __future__ import annotations

from textual.theme import Theme

DARK = Theme(
    name="kvchat-dark",
    primary="#7ea6c9",
    secondary="#9aa5b8",
    accent="#86b4d8",
    success="#8dbf9f",
    warning="#d9b873",
    error="#e08a8a",
    foreground="#d6dae2",
    background="#15171c",
    surface="#1b1e25",
    panel="#262b35",
    boost="#ffffff0c",
    variables={
        "border-blurred": "#2d3441",
        "footer-key-foreground": "#86b4d8",
        "input-selection-background": "#7ea6c9 35%",
        "scrollbar": "#3a4150",
        "scrollbar-hover": "#4a5365",
        "scrollbar-active": "#86b4d8",
        "scrollbar-background": "#15171c",
    },
)

LIGHT = Theme(
    name="kvchat-light",
    primary="#2b608a",
    secondary="#5a6577",
    accent="#2b608a",
    success="#2a6f4e",
    warning="#80560a",
    error="#a13333",
    foreground="#24272d",
    background="#fbfaf7",
    surface="#f3f1ec",
    panel="#e4e1d9",
    boost="#0000000a",
    dark=False,
    variables={
        "border-blurred": "#d3cfc4",
        "footer-key-foreground": "#2b608a",
        "input-selection-background": "#2b608a 25%",
        "scrollbar": "#c9c5ba",
        "scrollbar-hover": "#b3aea1",
        "scrollbar-active": "#2b608a",
        "scrollbar-background": "#fbfaf7",
    },
)

CONTRAST = Theme(
    name="kvchat-contrast",
    primary="#66d9ff",
    secondary="#ffffff",
    accent="#ffe14d",
    success="#5cff8f",
    warning="#ffd24d",
    error="#ffa0a0",
    foreground="#ffffff",
    background="#000000",
    surface="#000000",
    panel="#242424",
    boost="#101010",
    text_alpha=1.0,
    variables={
        "border-blurred": "#a0a0a0",
        "text-muted": "#e6e6e6",
        "foreground-muted": "#d9d9d9",
        "text-disabled": "#c0c0c0",
        "footer-key-foreground": "#ffe14d",
        "input-selection-background": "#0050a0",
        "block-cursor-foreground": "#000000",
        "block-cursor-background": "#ffe14d",
    },
)

THEMES = (DARK, LIGHT, CONTRAST)
