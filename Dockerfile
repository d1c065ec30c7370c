# docker build -t qconvert .
# docker run --rm -u "$(id -u):$(id -g)" -v /models:/models qconvert /models/IN /models/OUT --verify
FROM python:3.12-slim AS build
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY convert convert
COPY runtime runtime
RUN pip wheel --no-cache-dir --no-deps -w /wheels .

FROM python:3.12-slim
COPY --from=build /wheels /wheels
# A variant of torch for another GPU, or for none, is chosen by pip's own settings: --build-arg PIP_EXTRA_INDEX_URL=...
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG EXTRAS=""
RUN pip install --no-cache-dir "$(echo /wheels/*.whl)${EXTRAS}" && rm -r /wheels
RUN useradd --create-home qconvert
USER qconvert
WORKDIR /models
ENTRYPOINT ["qconvert"]
CMD ["--help"]
