"""Fitting learned scorers to conversations: collected once, fitted in steps that can be resumed, measured on others.

collecting     a conversation fed with nothing evicted; what is seen of each segment, in files
ridge, small   the gate's two forms, fitted to KVzip's scores
orders         the cost of an order, and its gradient (Plackett-Luce)
policies       policies fitted to the attention of later turns
progress       how far a fit is, in a file
figures        what held-out conversations say: tables and a plot
fit            the whole, as `kvchat fit` runs it
"""
