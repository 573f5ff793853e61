"""An ``OnlineRecommender`` over HTTP.

``app.Service`` is the application, and ``command.serve`` what ``ttt4rec serve`` does. They need the packages of the
extra ``serve``.
"""
