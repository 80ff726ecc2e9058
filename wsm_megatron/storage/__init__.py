"""Files that fail, hang, lag or change. Knows no format; may import ``process``."""
