"""Conversations: from rows to tokens, with the tokens that the loss counts.

../rows.py                     rows of files
turns.py, conversation.py      a row to messages
template.py                    messages to text and tokens: template_files.py, spans.py, literal.py
reading.py, writing.py         files to arrays, with policies for bad and too long rows
examples.py                    the arrays, prepared once and mapped by training
"""
