"""Draw what a command shows on a terminal, as SVG: `python3 terminal.py OUT.svg FRACTION COMMAND...`.

Needs pyte (PyPI). The picture is taken when FRACTION of the command's output has come.
"""

import html
import os
import pty
import sys

import pyte

COLUMNS, ROWS = 120, 14
COLOURS = {"default": "#d8d8d8", "red": "#f66", "green": "#7c6", "brown": "#db6", "blue": "#69f", "magenta": "#c7c", "cyan": "#6cc"}


def output(command):
    """All that a command writes to a terminal, in the pieces in which it came."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update(COLUMNS=str(COLUMNS), LINES=str(ROWS), TERM="xterm-256color")
        os.execvp(command[0], command)
    import fcntl, struct, termios

    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    pieces = []
    while True:
        try:
            piece = os.read(terminal, 4096)
        except OSError:
            break
        if not piece:
            break
        pieces.append(piece)
    os.waitpid(pid, 0)
    return pieces


def draw(screen):
    lines = []
    for row in range(ROWS):
        spans, x = [], 0
        for column in range(COLUMNS):
            cell = screen.buffer[row][column]
            colour = COLOURS.get(cell.fg, "#" + cell.fg if len(cell.fg) == 6 else COLOURS["default"])
            if spans and spans[-1][0] == colour:
                spans[-1][1] += cell.data
            else:
                spans.append([colour, cell.data])
        text = "".join(f'<tspan fill="{c}">{html.escape(t)}</tspan>' for c, t in spans)
        lines.append(f'<text x="10" y="{24 + 18 * row}" xml:space="preserve">{text}</text>')
    size = f'width="{COLUMNS * 8 + 20}" height="{ROWS * 18 + 20}"'
    style = "font-family: ui-monospace, Menlo, Consolas, monospace; font-size: 13.3px"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size}><rect width="100%" height="100%" rx="6" fill="#1e1e1e"/>'
        f'<g style="{style}">' + "\n".join(lines) + "</g></svg>\n"
    )


def main():
    target, fraction, *command = sys.argv[1:]
    pieces = output(command)
    screen = pyte.Screen(COLUMNS, ROWS)
    stream = pyte.ByteStream(screen)
    for piece in pieces[: max(1, int(len(pieces) * float(fraction)))]:
        stream.feed(piece)
    with open(target, "w") as file:
        file.write(draw(screen))
    print("\n".join(line.rstrip() for line in screen.display).rstrip())


main()
