"""Conversations: from rows to tokens, with the tokens that the loss counts.

../rows.py                     rows of files
turns.py, conversation.py      a row to messages
template.py                    messages to text and tokens: template_files.py, spans.py, literal.py
reading.py, writing.py         files to arrays, with policies for bad and too long rows
examples.py                    the arrays, prepared once and mapped by training

Comparisons of answers, by the same pieces:

comparison.py                  a row to a prompt and its answers: parting.py, transcript.py, ranking.py
preference_writing.py          answers to arrays; preference_report.py counts
preferences.py                 the arrays, prepared once and mapped by training

embedded.py                    conversations and comparisons that every machine has
"""
