"""A stand-in for the Hugging Face Hub on 127.0.0.1: repositories in memory, as huggingface_hub's client sees them."""

import base64
import contextlib
import hashlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def _wants_private(request):
    return request.get('visibility') == 'private' or request.get('private') is True


def _commit(repo):
    return hashlib.sha1(repr(sorted(repo['files'].items())).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def log_message(self, *args):
        pass

    def _body(self):
        if self.headers.get('Transfer-Encoding') == 'chunked':
            data = b''
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data
        return self.rfile.read(int(self.headers.get('Content-Length', 0)))

    def _send(self, status, body=b'', **headers):
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
            headers['Content-Type'] = 'application/json'
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace('_', '-'), value)
        self.send_header('Content-Length', headers.get('Content_Length', str(len(body))))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)

    def _refused(self):
        """Note the request; answer it with the status that its path is to get, if any."""
        self.server.log.append(f'{self.command} {self.path}')
        for part, status in self.server.statuses.items():
            if part in self.path:
                if status == 'slow':
                    time.sleep(3)
                self._body()
                self._send(status if isinstance(status, int) else 504)
                return True
        return False

    def _missing(self, code):
        self._send(404, b'', X_Error_Code=code)

    def do_POST(self):
        if self._refused():
            return None
        repos, parts = self.server.repos, self.path.split('?')[0].strip('/').split('/')
        body = self._body()
        if self.path == '/api/validate-yaml':
            return self._send(200, dict(errors=[], warnings=[]))
        if self.path == '/api/repos/create':
            request = json.loads(body)
            name = f'{request.get("organization") or "me"}/{request["name"]}'
            repos.setdefault(name, dict(files={}, private=_wants_private(request)))
            return self._send(200, dict(url=f'{self.server.address}/{name}', id=name, name=name))
        repo = repos.get('/'.join(parts[2:4]))
        if repo is None:
            return self._missing('RepoNotFound')
        if parts[4] == 'branch':
            repo.setdefault('branches', []).append(parts[5])
            return self._send(200, {})
        if parts[4] == 'preupload':
            files = [dict(path=f['path'], uploadMode='regular', shouldIgnore=False) for f in json.loads(body)['files']]
            return self._send(200, dict(files=files))
        if parts[4] == 'commit':
            if parts[5] not in ('main', *repo.get('branches', [])):
                return self._missing('RevisionNotFound')
            for line in map(json.loads, body.splitlines()):
                if line['key'] == 'file':
                    repo['files'][line['value']['path']] = base64.b64decode(line['value']['content'])
                elif line['key'] == 'deletedFile':
                    del repo['files'][line['value']['path']]
            address = f'{self.server.address}/{"/".join(parts[2:4])}/commit/{_commit(repo)}'
            return self._send(200, dict(commitUrl=address, commitOid=_commit(repo), hookOutput=''))
        return self._missing('EntryNotFound')

    def do_GET(self):
        if self._refused():
            return None
        parts = self.path.split('?')[0].strip('/').split('/')
        if parts[:2] == ['api', 'whoami-v2']:
            return self._send(200, dict(name='me', type='user'))
        if parts[0] == 'api' and parts[1] == 'models':
            repo, name = self.server.repos.get('/'.join(parts[2:4])), '/'.join(parts[2:4])
            if repo is None:
                return self._missing('RepoNotFound')
            if parts[4:5] == ['tree']:
                return self._send(200, [dict(type='file', path=p, size=1, oid=_commit(repo)) for p in repo['files']])
            files = [dict(rfilename=path) for path in repo['files']]
            return self._send(
                200, dict(id=name, modelId=name, sha=_commit(repo), private=repo['private'], siblings=files)
            )
        repo = self.server.repos.get('/'.join(parts[:2]))
        if repo is None:
            return self._missing('RepoNotFound')
        data = repo['files'].get('/'.join(parts[4:]))
        if data is None:
            return self._missing('EntryNotFound')
        etag = f'"{hashlib.sha1(data).hexdigest()}"'
        return self._send(200, data, ETag=etag, X_Repo_Commit=_commit(repo), Content_Length=str(len(data)))

    do_HEAD = do_GET


@contextlib.contextmanager
def hub_server():
    """Serve.

    Gives a server with ``address``, ``repos`` (name -> files and whether it is private), ``log`` (requests so far) and
    ``statuses``, to be filled by the test: part of a path -> the status that such requests get, or 'slow'.
    """
    server = ThreadingHTTPServer(('127.0.0.1', 0), _Handler)
    server.address = f'http://127.0.0.1:{server.server_port}'
    server.repos, server.log, server.statuses = {}, [], {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
