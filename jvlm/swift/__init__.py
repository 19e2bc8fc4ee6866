"""ms-swift's command line (github.com/modelscope/ms-swift): its arguments, mapped to jvlm's experiments."""
