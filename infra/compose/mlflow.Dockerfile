FROM python:3.11.14-slim-bookworm
RUN pip install --no-cache-dir 'mlflow[auth]==3.17.2' psycopg2-binary==2.9.13 boto3==1.44.8 \
    && useradd --create-home --uid 1000 mlflow
USER 1000
WORKDIR /home/mlflow
