"""Texts for measuring and training: reading, tokenizing once, packing into long rows.

`documents` reads files (text, JSON lines, Parquet), `sources` adds hub datasets and selections, `store` keeps what was
tokenized on disk, `chats` tokenizes conversations, `packing`, `pairs` and `chat_rows` make rows of the training length
of it, and `report` says what was read.
"""

from masformer.data.documents import DATA_FORMS, Document, Row, read_documents, read_rows

__all__ = ["DATA_FORMS", "Document", "Row", "read_documents", "read_rows"]
