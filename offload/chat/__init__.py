"""A conversation in a terminal: reading lines, slash commands, drawing answers, saving chats.

This room knows terminals and turns. It does not know how tokens come to be (`offload.generation`).
"""
