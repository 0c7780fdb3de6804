"""The command line: a file a command or group of commands, and chatting line by line.

app.py         the program: errors and exit codes; commands that run the model
flags.py       options that commands share         groups.py, completion.py   help by group, names for the shell
plain.py       progress and answers as lines       line_chat.py, line_commands.py   the chat without a screen
doctor.py      checks of this machine              store.py       what commands on the store share
"""
