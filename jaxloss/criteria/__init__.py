"""Complete criteria that join losses of several families."""
